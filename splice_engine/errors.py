"""The error for what a user can correct, and the command that brings missing packages."""

import importlib
import sys
from types import ModuleType


class SpliceError(ValueError):
    """A mistake that the user can correct; its text says in one line what is wrong and what to do."""


def pip_command(*requirements: str) -> str:
    """The command that installs packages for the Python that runs, which need not be the one that a shell finds."""
    words = " ".join(f'"{text}"' if set(text) & set("<>") else text for text in requirements)
    return f'`"{sys.executable}" -m pip install {words}`'


def import_extra(module: str, package: str, need: str, way_out: str = "") -> ModuleType:
    """A module that is imported only where it is needed.

    Args:
        module: Its name.
        package: What brings it.
        need: Who needs it, such as "videos need".
        way_out: What else the user can do.

    Raises:
        SpliceError: It is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise SpliceError(f"{need} the package {package}: {pip_command(package)}{way_out}") from None
