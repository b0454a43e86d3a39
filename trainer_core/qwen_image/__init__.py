"""The Qwen-Image-Edit family: flavours, the three networks, latents, prompts and sampling."""
