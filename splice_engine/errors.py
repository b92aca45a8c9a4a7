"""The one error a caller is meant to read."""


class SpliceError(ValueError):
    """A mistake that the user can mend; its text says what is wrong and how to mend it, in one line."""
