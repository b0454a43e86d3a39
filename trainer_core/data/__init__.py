"""Pairs of pictures and captions, read from disk and checked."""
