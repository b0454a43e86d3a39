"""The learning rate as a pure function of the step, so that checkpoints need no scheduler state."""

from __future__ import annotations

import math

from ..config import OptimizerConfig


def learning_rate_at(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of step `step` (counted from 0) of `num_steps`: a linear warm-up, then the chosen schedule.

    The schedules equal those of `get_scheduler` in diffusers and transformers, without their first step at rate 0: step
    s here is step s + 1 there, with one more step of warm-up and of training. All but the constant ones reach their
    final rate (0, or `lr_end` for polynomial) after the last step.
    """
    peak, warmup = optimizer.learning_rate, optimizer.lr_warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    match optimizer.lr_scheduler:
        case "linear":
            return peak * (1 - progress)
        case "cosine":
            return peak * (1 + math.cos(math.pi * progress)) / 2
        case "cosine_with_restarts":
            cycle = optimizer.lr_num_cycles * progress % 1
            return peak * (1 + math.cos(math.pi * cycle)) / 2 if progress < 1 else 0.0
        case "polynomial":
            return optimizer.lr_end + (peak - optimizer.lr_end) * (1 - progress) ** optimizer.lr_power
        case _:
            return peak
