"""Many pairs: a table of them, worked through by processes on one machine or by a Ray cluster."""
