"""torch's attention kernels, called so that the log-sum-exp of the scores is kept, and the choice between them.

Which kernel is fastest depends on the card and the number of tokens: on an H200 cuDNN's takes 0.6 of the time of the
flash kernel, on other cards torch may not offer it. So they are timed once for each size.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_WARM, _TIMED = 2, 5  # passes forward and backward
_FASTER = 0.95  # a later kernel is taken if it needs at most this fraction of the time of the ones before it
_PLAIN: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False}
_chosen: dict[tuple[object, ...], str] = {}  # kernel by device and size, for this process


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel. `forward` takes queries [1, M, H, d], keys and values [1, N, H, d], and returns the output [1, M, H, d]
    and the log-sum-exp. `backward` takes the output's gradient, the three inputs and both results, and returns the
    gradients of the inputs."""

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]


def kernel_for(query: Tensor, key: Tensor) -> Kernel | None:
    """The fastest kernel for these queries [1, M, H, d] and keys [1, N, H, d]; None if there is none for the device."""
    if query.device.type == "cpu":
        return CPU
    if query.device.type == "meta":  # steps whose bytes are counted without a device
        return CUDA[0]
    if query.device.type != "cuda" or torch.version.hip:
        return None
    key_ = (query.device, query.dtype, *query.shape[2:], _size_class(query.shape[1]), _size_class(key.shape[1]))
    if key_ not in _chosen:
        usable = [kernel for kernel in CUDA if _runs(kernel, query)]
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed now
            return usable[0] if usable else None
        try:
            _chosen[key_] = _fastest(usable, query, key) if usable else ""
        except torch.OutOfMemoryError:  # a pass forward and backward doesn't fit now, for example in a preview
            return usable[0]
    return next((kernel for kernel in CUDA if kernel.name == _chosen[key_]), None)


def _size_class(tokens: int) -> int:
    return math.ceil(math.log2(max(tokens, 1)))


def _runs(kernel: Kernel, like: Tensor) -> bool:
    """Whether the kernel supports the card, the dtype and the head width."""
    short = torch.zeros(1, 16, *like.shape[2:], dtype=like.dtype, device=like.device)
    try:
        out, length = kernel.forward(short, short, short)
        kernel.backward(out, short, short, short, out, length)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return False
    return True


@torch.no_grad()
def _fastest(kernels: list[Kernel], query: Tensor, key: Tensor) -> str:
    """The name of the kernel with the shortest forward and backward pass."""
    inputs = query.detach(), key.detach(), key.detach()  # new values would change torch's random state
    best, shortest = kernels[0].name, math.inf
    for kernel in kernels:
        if len(kernels) > 1 and (seconds := _seconds(kernel, *inputs)) < _FASTER * shortest:
            best, shortest = kernel.name, seconds
    return best


def _seconds(kernel: Kernel, query: Tensor, key: Tensor, value: Tensor) -> float:
    times = []
    for number in range(_WARM + _TIMED):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        out, length = kernel.forward(query, key, value)
        kernel.backward(out, query, key, value, out, length)
        ended.record()
        if number >= _WARM:
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1e3)
    return statistics.median(times)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [each.transpose(1, 2) for each in tensors]


def _tokens_first(*tensors: Tensor) -> Any:
    return tuple(each.transpose(1, 2) for each in tensors)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, length, *_ = forward(*_heads_first(query, key, value), None, compute_log_sumexp=True)
    return out.transpose(1, 2), length


def _cudnn_backward(gradient: Tensor, *of_forward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, length = of_forward
    gradient, query, key, value, out = _heads_first(gradient, *tensors)
    seed = torch.empty((), dtype=torch.int64, device=gradient.device)  # for dropout, which is off
    backward: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    none: Any = None
    lengths = query.shape[2], key.shape[2]
    seeds_and_masks = seed, seed, none, none, none
    found = backward(gradient, query, key, value, out, length, *seeds_and_masks, *lengths, **_PLAIN)
    return _tokens_first(*found)


def _flash_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    out, length, *_ = torch.ops.aten._scaled_dot_product_flash_attention.default(*_heads_first(query, key, value))
    return out.transpose(1, 2), length


def _flash_backward(gradient: Tensor, *of_forward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, length = of_forward
    gradient, query, key, value, out = _heads_first(gradient, *tensors)
    seed = torch.empty((2,), dtype=torch.uint64, device=gradient.device)  # for dropout, which is off
    backward: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward.default
    none: Any = None
    lengths = query.shape[2], key.shape[2]
    found = backward(
        gradient, query, key, value, out, length, none, none, *lengths, philox_seed=seed, philox_offset=seed, **_PLAIN
    )
    return _tokens_first(*found)


def _efficient_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_efficient_attention.default
    out, length, *_ = forward(*_heads_first(query, key, value), None, compute_log_sumexp=True)
    return out.transpose(1, 2), length


def _efficient_backward(gradient: Tensor, *of_forward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, length = of_forward
    gradient, query, key, value, out = _heads_first(gradient, *tensors)
    seed = torch.empty((), dtype=torch.int64, device=gradient.device)  # for dropout, which is off
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    wanted = [True, True, True, False]
    found = backward(gradient, query, key, value, None, out, length, seed, seed, 0.0, wanted)
    return _tokens_first(*found[:3])


def _cpu_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    out, length = forward(*_heads_first(query, key, value))
    return out.transpose(1, 2), length


def _cpu_backward(gradient: Tensor, *of_forward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, length = of_forward
    gradient, query, key, value, out = _heads_first(gradient, *tensors)
    backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
    return _tokens_first(*backward(gradient, query, key, value, out, length, **_PLAIN))


CPU = Kernel("cpu", _cpu_forward, _cpu_backward)
# In this order, the first that the card supports is the usual choice.
CUDA = (
    Kernel("flash", _flash_forward, _flash_backward),
    Kernel("cudnn", _cudnn_forward, _cudnn_backward),
    Kernel("efficient", _efficient_forward, _efficient_backward),
)
