"""Random numbers as a function of (seed, purpose, index), so that no generator state has to be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def stream(seed: int, purpose: str, index: int | str = 0) -> torch.Generator:
    """A new CPU generator. Equal arguments give equal draws in every process and on every platform.

    Draw on the CPU and move the result: GPUs draw other numbers, and a run must not depend on its device.
    """
    digest = hashlib.sha256(f"{seed}\x00{purpose}\x00{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)  # a non-negative int64


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Restores torch's global generators when the context ends, whatever third-party code drew inside."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield


@contextmanager
def seeded_globally(seed: int, purpose: str, index: int, device: torch.device) -> Iterator[None]:
    """Seeds torch's global generators for code in the context that draws from them (dropout), then restores them."""
    with undisturbed(device):
        torch.random.manual_seed(stream(seed, purpose, index).initial_seed())
        yield
