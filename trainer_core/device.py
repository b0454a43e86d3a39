"""Choice of the compute device, and its memory."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable

import psutil
import torch

from .errors import ConfigError

_HEAD_START = 4_000_000  # clock cycles, which are 1.6 to 3.3 milliseconds


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


def seconds_on_device(device: torch.device, call: Callable[[], object], times: int = 4) -> float:
    """Median seconds for which a CUDA device works on a call, after two calls that are not counted.

    The device waits before each call, so that the processor has enqueued it in the meantime. Otherwise the time of a
    short call would be the processor's.
    """
    taken: list[float] = []
    with torch.cuda.device(device):
        for _ in range(2 + times):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(_HEAD_START)  # pyright: ignore[reportPrivateUsage]
            begin.record()
            call()
            end.record()
            end.synchronize()
            taken.append(begin.elapsed_time(end) / 1000)
    return statistics.median(taken[2:])


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
