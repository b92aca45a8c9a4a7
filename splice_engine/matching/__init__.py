"""Which part of one picture belongs to which of another, and the picture painted from it."""
