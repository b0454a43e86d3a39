"""What processes that train together exchange: where they start, and a step's gradients and losses, added up."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..errors import RunFolderError
from ..ranks import Ranks


def check_same_start(ranks: Ranks, done: int, weights: Mapping[str, Tensor]) -> None:
    """Only gradients are exchanged later, so all have to begin with the same weights after the same `done` steps.

    Raises:
        RunFolderError: they don't, in each of them.
        LostRankError: a process is gone.
    """
    if ranks.size == 1:
        return
    states = ranks.all_gather_ints((done, _digest(weights)))
    if len(set(states)) > 1:
        found = "; ".join(
            f"process {rank}: step {step}, weights {name:016x}" for rank, (step, name) in enumerate(states)
        )
        raise RunFolderError(
            f"The {ranks.size} processes would not train the same LoRA. They start from {found}. The run folder and "
            "the model's and init_lora's files have to be the same for all: put the run folder on a disk that all "
            "machines see, at the same path. Nothing was trained."
        )


def _digest(weights: Mapping[str, Tensor]) -> int:
    """63 bits that stand for these weights, to the last bit."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


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
    flat = ranks.all_reduce_sum(torch.cat([*(each.flatten() for each in gradients), numbers.flatten()]))
    sizes = [weight.numel() for weight in weights]
    *sums, together = flat.split([*sizes, numbers.numel()])
    for weight, gradient in zip(weights, sums, strict=True):
        weight.grad = gradient.view_as(weight)
    return together.view_as(numbers)
