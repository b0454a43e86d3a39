"""Placement of weights and activations during a step: device memory, host memory, or recomputation."""
