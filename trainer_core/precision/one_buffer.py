"""Moves a block's weights to host memory, into one allocation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..device import aligned


def move_to_host(modules: Iterable[nn.Module]) -> None:
    """Move the modules' own parameters and buffers from any device into one allocation in host memory.

    The C library returns one large allocation to the system when it is freed, but keeps the gaps that many small ones
    leave. With one allocation per weight, loading would end with about twice the memory that the weights need.
    """
    tensors = [each for module in modules for each in _own_tensors(module)]
    buffer = torch.empty(sum(aligned(each.nbytes) for each in tensors), dtype=torch.uint8)
    if any(each.is_cuda for each in tensors):
        # The system maps memory when it is first written. This does it with all threads, CUDA's copies with one.
        buffer.zero_()
    place = 0
    for each in tensors:
        moved = buffer[place : place + each.nbytes].view(each.dtype).view(each.shape)
        place += aligned(each.nbytes)
        each.data = moved.copy_(each)


def _own_tensors(module: nn.Module) -> list[Tensor]:
    """The module's own parameters and buffers, without those of its children."""
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]
