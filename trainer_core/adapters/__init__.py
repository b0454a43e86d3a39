"""LoRA, DoRA and LoKr: which layers, in the network, and as files."""
