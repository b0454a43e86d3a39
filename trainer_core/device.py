"""Where to compute."""

from __future__ import annotations

import gc

import torch

from .errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The torch device for a setting; `auto` takes the first accelerator, else the CPU.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {name!r}, which is not usable here ({error}). Allowed: auto, cpu, cuda."
        ) from error
    return device


def peak_bytes(device: torch.device) -> int:
    """The most that torch's tensors took on the device so far; 0 where that is not counted."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def release_memory() -> None:
    """Return the accelerator's memory of networks that are no longer used, so that others can have it."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
