"""The learning rate as a pure function of the step, so that checkpoints need no scheduler state."""

from __future__ import annotations

import math

from ..config import OptimizerConfig


def learning_rate_at(step: int, num_steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of step `step` (counted from 0) of `num_steps`: a linear warm-up, then the chosen schedule.

    The schedules equal those of `get_scheduler` in diffusers and transformers, without their first step at rate 0: step
    s here is step s + 1 there, with one more step of warm-up and of training. All but the constant ones and the waves
    reach their final rate (0, or `lr_end` for polynomial) after the last step.

    The waves swing between the peak and `lr_end`, with `lr_wave_steps` from one to the other. They equal SimpleTuner's
    cosine and sine, which round rates down to multiples of 1e-9.
    """
    peak, warmup = optimizer.learning_rate, optimizer.lr_warmup_steps
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, num_steps - warmup))
    phase = math.pi * (step - warmup) / optimizer.lr_wave_steps
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
        case "cosine_wave":
            return optimizer.lr_end + (peak - optimizer.lr_end) * (1 + math.cos(phase)) / 2
        case "sine_wave":
            return optimizer.lr_end + (peak - optimizer.lr_end) * (1 + math.sin(phase)) / 2
        case _:
            return peak
