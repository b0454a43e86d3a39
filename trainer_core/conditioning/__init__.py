"""From pairs of pictures to the latents and prompt embeddings a training step reads."""
