"""The LoRA file that other programs load."""
