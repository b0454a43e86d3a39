"""Gradients and losses of a step, added up over the processes that train together, in one exchange."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..ranks import Ranks


def add_up_step(ranks: Ranks, weights: Collection[nn.Parameter], own: Tensor, *, before: int, total: int) -> Tensor:
    """Numbers [n, total] of all processes' pairs, after the gradients of `weights` have become sums over the processes.

    `own` [n, pairs] are those of this process's pairs, and `before` counts the step's pairs that come before them.

    Raises:
        LostRankError: a process is gone; the gradients are as they were.
    """
    if ranks.size == 1:
        return own
    numbers = torch.zeros(len(own), total, device=own.device)
    numbers[:, before : before + own.shape[1]] = own
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    flat = ranks.add_up(torch.cat([*(each.flatten() for each in gradients), numbers.flatten()]))
    sizes = [weight.numel() for weight in weights]
    *sums, together = flat.split([*sizes, numbers.numel()])
    for weight, gradient in zip(weights, sums, strict=True):
        weight.grad = gradient.view_as(weight)
    return together.view_as(numbers)
