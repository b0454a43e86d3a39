"""torch's attention kernels, called so that the log-sum-exp of the scores is kept."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_PLAIN: dict[str, Any] = {"dropout_p": 0.0, "is_causal": False}
_ALIGNED = 32  # queries: the efficient kernel's log-sum-exp is filled up to a multiple of it


def no_pass(*_: Tensor) -> Any:
    """Stands for a pass that a kernel lacks."""
    raise NotImplementedError


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel with the same results as every other, so one's backward pass can follow another's forward pass.

    `forward` takes queries [1, M, H, d], keys and values [1, N, H, d]. It returns the output [1, M, H, d] and the
    natural logarithm of the sum of the scores' exponentials [1, H, M] in float32. `backward` takes the output's
    gradient, the three inputs and both results, and returns the gradients of the inputs. Either may be `no_pass`.
    `is_exact`: it rounds nothing to 8 bits.
    """

    name: str
    forward: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    is_exact: bool = True


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [each.transpose(1, 2) for each in tensors]


def _tokens_first(*tensors: Tensor) -> Any:
    return tuple(each.transpose(1, 2) for each in tensors)


def _cudnn_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    forward = torch.ops.aten._scaled_dot_product_cudnn_attention.default
    out, length, *_ = forward(*_heads_first(query, key, value), None, compute_log_sumexp=True)
    return out.transpose(1, 2), length.squeeze(-1)


def _cudnn_backward(gradient: Tensor, *of_forward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, length = of_forward
    gradient, query, key, value, out = _heads_first(gradient, *tensors)
    seed = torch.empty((), dtype=torch.int64, device=gradient.device)  # for dropout, which is off
    backward: Any = torch.ops.aten._scaled_dot_product_cudnn_attention_backward.default
    none: Any = None
    lengths = query.shape[2], key.shape[2]
    seeds_and_masks = seed, seed, none, none, none
    found = backward(gradient, query, key, value, out, length.unsqueeze(-1), *seeds_and_masks, *lengths, **_PLAIN)
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
    return out.transpose(1, 2), length[..., : query.shape[1]].contiguous()


def _efficient_backward(gradient: Tensor, *of_forward: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    *tensors, length = of_forward
    gradient, query, key, value, out = _heads_first(gradient, *tensors)
    seed = torch.empty((), dtype=torch.int64, device=gradient.device)  # for dropout, which is off
    backward = torch.ops.aten._scaled_dot_product_efficient_attention_backward.default
    wanted = [True, True, True, False]
    length = functional.pad(length, (0, -length.shape[-1] % _ALIGNED), value=math.inf)  # as its forward pass does
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
