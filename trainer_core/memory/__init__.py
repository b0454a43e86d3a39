"""Where weights and activations live during a step: device, host, or computed again."""
