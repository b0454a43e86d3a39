"""Reads and writes run folders."""
