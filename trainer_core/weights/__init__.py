"""Reads weight files in all supported formats, tensor by tensor. Knows file layouts, not networks."""
