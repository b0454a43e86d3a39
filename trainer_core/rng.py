"""Randomness as a function of (seed, purpose, index): no generator state to save, none to disturb."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream(seed: int, purpose: str, index: int | str = 0) -> torch.Generator:
    """A fresh CPU generator; equal arguments give equal draws in every process and on every platform.

    Draws are made on the CPU and moved, so that a run does not depend on the device it started on.
    """
    digest = hashlib.sha256(f"{seed}\x00{purpose}\x00{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Torch's process-wide generators are afterwards as they were, whatever code of others draws inside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded_globally(seed: int, purpose: str, index: int, device: torch.device) -> Iterator[None]:
    """For code of others that draws from torch's process-wide generators (dropout): seeded inside, untouched after."""
    with undisturbed(device):
        torch.random.manual_seed(stream(seed, purpose, index).initial_seed())
        yield
