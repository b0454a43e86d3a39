"""Trains LoRAs for Qwen-Image-Edit on paired pictures. Knows nothing of ComfyUI; importing it has no effect."""
