"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from ..config import OptimizerConfig


def learning_rate_at(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of step `step` (counted from 0) of `num_steps`: a linear warm-up, then the chosen course.

    `linear` and `cosine` reach zero after the last step.
    """
    warmup = optimizer.lr_warmup_steps
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / (warmup + 1)
    progress = (step - warmup) / max(1, num_steps - warmup)
    if optimizer.lr_scheduler == "linear":
        return optimizer.learning_rate * (1 - progress)
    if optimizer.lr_scheduler == "cosine":
        return optimizer.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    return optimizer.learning_rate
