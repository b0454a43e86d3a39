"""Encode pairs of pictures into the latents and prompt embeddings that training reads."""
