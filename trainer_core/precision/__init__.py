"""Precision and placement of frozen weights. Knows nn.Linear, not Qwen."""
