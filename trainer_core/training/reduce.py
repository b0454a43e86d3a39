"""Data that the processes of a distributed training exchange: their starting state, and each step's gradients."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from ..errors import RunFolderError
from ..ranks import Ranks


def check_same_start(ranks: Ranks, done: int, weights: Mapping[str, Tensor]) -> None:
    """Check that all processes start with the same step and weights, because later they exchange only gradients.

    Raises:
        RunFolderError: they differ. Every process raises it.
        LostRankError: another process has ended or hangs.
    """
    if ranks.size == 1:
        return
    states = ranks.all_gather_ints((done, _digest(weights)))
    if len(set(states)) > 1:
        found = "; ".join(
            f"process {rank}: step {step}, weights {digest:016x}" for rank, (step, digest) in enumerate(states)
        )
        raise RunFolderError(
            f"The {ranks.size} processes do not start from the same LoRA ({found}). Put the run folder on a disk that "
            "all machines see at the same path, and use the same model and init_lora files everywhere. Nothing was "
            "trained."
        )


def _digest(weights: Mapping[str, Tensor]) -> int:
    """A 63-bit hash of the weights' names and bytes."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode())
        digest.update(weights[name].detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def add_up_step(ranks: Ranks, weights: Collection[nn.Parameter], own: Tensor, *, before: int, total: int) -> Tensor:
    """Sum the gradients of `weights` over all processes, and collect n numbers per pair of the step: [n, total].

    `own` [n, pairs] are the numbers of this process's pairs; `before` is how many pairs of the step precede them.

    Raises:
        LostRankError: another process has ended or hangs. The gradients are unchanged.
    """
    if ranks.size == 1:
        return own
    numbers = torch.zeros(len(own), total, device=own.device)
    numbers[:, before : before + own.shape[1]] = own
    gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    flat = ranks.all_reduce_sum(torch.cat([*(each.flatten() for each in gradients), numbers.flatten()]))
    *sums, of_all = flat.split([*(weight.numel() for weight in weights), numbers.numel()])
    for weight, gradient in zip(weights, sums, strict=True):
        weight.grad = gradient.view_as(weight)
    return of_all.view_as(numbers)
