"""The error for what a user can correct, and the command that brings missing packages."""

import sys


class SpliceError(ValueError):
    """A mistake that the user can correct; its text says in one line what is wrong and what to do."""


def pip_command(*requirements: str) -> str:
    """The command that installs packages for the Python that runs, which need not be the one that a shell finds."""
    words = " ".join(f'"{text}"' if set(text) & set("<>") else text for text in requirements)
    return f'`"{sys.executable}" -m pip install {words}`'
