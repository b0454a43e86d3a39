"""The run folder: what it holds, how it is read and written."""
