"""The Qwen-Image-Edit models: flavours, the three networks, latents, prompts and sampling."""
