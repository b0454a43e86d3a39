"""Choice of the compute device, and its memory."""

from __future__ import annotations

import gc

import psutil
import torch

from .errors import ConfigError


def pick_device(name: str) -> torch.device:
    """The torch device for a setting. `auto` picks CUDA, then MPS, then the CPU.

    Raises:
        ConfigError: this machine has no such device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)  # fails now rather than after minutes of loading
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"device is {name!r}, which this machine can't use ({error}). Set it to auto, cpu or cuda."
        ) from error
    return device


def card_gib(name: str) -> float | None:
    """Memory in GiB of the card for a device setting, also what other programs use now; None without CUDA.

    It is what the driver lets a process use, as ComfyUI tells it too. A shared card may have more.

    Raises:
        ConfigError: as `pick_device`.
    """
    device = pick_device(name)
    return torch.cuda.mem_get_info(device)[1] / 2**30 if device.type == "cuda" else None


def peak_bytes(device: torch.device) -> int:
    """Peak bytes that torch's tensors have used on a CUDA device so far; 0 on other devices."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def free_bytes(device: torch.device) -> int:
    """Bytes that new tensors on the device can use now. Devices other than CUDA share host memory."""
    if device.type != "cuda":
        return int(psutil.virtual_memory().available)
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def copied_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor on the device. A copy from host memory to CUDA does not wait for the work enqueued before it."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def release_memory() -> None:
    """Give unused CUDA memory back to the driver, so that other programs can use it."""
    if torch.cuda.is_available():
        gc.collect()  # networks may be part of reference cycles, which only the collector frees
        torch.cuda.empty_cache()


def aligned(size: int) -> int:
    """A size in bytes, rounded up to a multiple of 256: where the next tensor in one allocation may begin.

    CUDA aligns its own allocations like this, so kernels run on a view as fast as on a tensor of its own.
    """
    return -(-size // 256) * 256
