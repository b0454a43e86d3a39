"""Data sets as folders below one root: found, read, and changed without losing or overwriting a file."""
