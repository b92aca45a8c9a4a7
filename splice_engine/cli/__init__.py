"""The command line `splice`."""

from .main import main

__all__ = ["main"]
