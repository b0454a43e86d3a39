"""Moves a block's weights in host memory into one allocation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..device import aligned


def in_one_buffer(network: nn.Module, names: Iterable[str]) -> None:
    """Move the named modules' parameters and buffers in host memory into one allocation.

    The C library returns one large allocation to the system when it is freed, but keeps the gaps that many small ones
    leave. With one allocation per weight, loading would end with about twice the memory that the weights need.
    """
    held = [each for name in names for each in _own_tensors(network.get_submodule(name)) if each.device.type == "cpu"]
    buffer = torch.empty(sum(aligned(each.nbytes) for each in held), dtype=torch.uint8)
    place = 0
    for each in held:
        moved = buffer[place : place + each.nbytes].view(each.dtype).view(each.shape)
        place += aligned(each.nbytes)
        each.data = moved.copy_(each)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers, without those of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
