"""Weight formats and placement of frozen layers. Knows nn.Linear, not Qwen."""
