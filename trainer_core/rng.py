"""Randomness as a function of (seed, purpose, index): no generator state to save, none to disturb."""

from __future__ import annotations

import hashlib

import torch


def stream(seed: int, purpose: str, index: int | str = 0) -> torch.Generator:
    """A fresh CPU generator; equal arguments give equal draws in every process and on every platform.

    Draws are made on the CPU and moved, so that a run does not depend on the device it started on.
    """
    digest = hashlib.sha256(f"{seed}\x00{purpose}\x00{index}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
