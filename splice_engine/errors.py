"""The error for what a user can correct."""


class SpliceError(ValueError):
    """A mistake that the user can correct; its text says in one line what is wrong and what to do."""
