"""Launches Triton kernels with little work on the processor, which small pictures otherwise wait for.

A step launches several thousand kernels. Each time, Triton looks for the code that it has compiled for arguments like
these, which takes most of a launch's 20 to 30 microseconds. Here, one lookup finds it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Options = Mapping[str, Any]  # how Triton compiles a kernel, such as num_warps
_COMPILED: dict[tuple[Any, ...], Any] = {}


def launch(kernel: Any, grid: tuple[int, int, int], *arguments: Any, options: Options, **constants: Any) -> None:
    """Enqueue a kernel on the device of its first argument, which is a tensor.

    `constants` are the kernel's last parameters, in their order: Triton compiles the kernel for these values.
    """
    device = arguments[0].device
    if device.type != "cuda":  # Triton's interpreter
        kernel[grid](*arguments, **constants, **options)
    elif device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(device):
            _on_current_device(kernel, grid, arguments, constants, options)
    else:
        _on_current_device(kernel, grid, arguments, constants, options)


def _on_current_device(
    kernel: Any, grid: tuple[int, int, int], arguments: tuple[Any, ...], constants: Options, options: Options
) -> None:
    kinds = tuple(map(_kind, arguments))
    key = (id(kernel), arguments[0].device.index, kinds, *constants.values(), *options.values())
    if (compiled := _COMPILED.get(key)) is not None:
        compiled[grid](*arguments, *constants.values())
        return
    last = kernel.arg_names[len(arguments) :]
    assert list(constants) == last, f"{list(constants)} are not the last parameters of the kernel, which are {last}"
    _COMPILED[key] = kernel[grid](*arguments, **constants, **options)


def _kind(argument: Any) -> Any:
    """What Triton's code depends on: a tensor's type, what is a multiple of 16, and numbers that are 1 or need 64 bits.
    Other arguments, such as None, count with their values."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument % 16 == 0, argument == 1, -(2**31) <= argument < 2**31
    return float if isinstance(argument, float) else argument


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. Triton's own takes some microseconds, as does its `next_power_of_2`."""
    return -(-a // b)


def power_of_2(least: int) -> int:
    """The smallest power of two that is at least this."""
    return 1 << max(0, least - 1).bit_length()
