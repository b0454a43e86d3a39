"""LoRA, DoRA and LoKr: planned per layer, injected into the network, read from and written to files."""
