"""Queries and keys of a block: normalised per head, rotated by their positions, and those of prompt and picture joined.

On a CUDA device with Triton a kernel does all that in one pass over memory. For the compiler it is an operator that it
does not look into: its own code for the rotation of neighbouring numbers takes three times as long.

Shapes: T prompt tokens, L picture tokens, H heads, d head width.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..precision.operators import define, namespace_of, operator
from ..text import reason_of

_LOG = logging.getLogger(__name__)
_NAMESPACE = namespace_of(__name__)


def joined(
    prompt: Tensor, picture: Tensor, prompt_weight: Tensor, weight: Tensor, angles: Tensor, eps: float
) -> Tensor:
    """Queries or keys of prompt [1, T, H, d] and picture [1, L, H, d] as one tensor [1, T + L, H, d].

    y = rotate(x / sqrt(mean(x²) + eps) in x's dtype, times the weight [d]), as diffusers' RMSNorm and rotary embedding
    compute it. `angles` are the cosines and sines [T + L, d / 2, 2] in float32, by which neighbouring numbers are
    rotated like complex numbers. Only prompt and picture get gradients, and only they are kept for the backward pass.
    """
    return _Joined.apply(prompt, picture, prompt_weight, weight, angles, eps)  # type: ignore[no-untyped-call]


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, prompt: Tensor, picture: Tensor, prompt_weight: Tensor, weight: Tensor, angles: Tensor, eps: float
    ) -> Tensor:
        ctx.save_for_backward(prompt, picture, prompt_weight, weight, angles)
        ctx.eps = eps
        forward = operator(_NAMESPACE, "forward") if torch.compiler.is_compiling() else _forward
        return forward(prompt, picture, prompt_weight, weight, angles, eps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        backward = operator(_NAMESPACE, "backward") if torch.compiler.is_compiling() else _backward
        prompt, picture, prompt_weight, weight, angles = ctx.saved_tensors
        of_inputs = backward(gradients[0], prompt, picture, prompt_weight, weight, angles, ctx.eps)
        return *of_inputs, None, None, None, None


def _forward(
    prompt: Tensor, picture: Tensor, prompt_weight: Tensor, weight: Tensor, angles: Tensor, eps: float
) -> Tensor:
    tokens = prompt.shape[1]
    result = picture.new_empty(1, tokens + picture.shape[1], *picture.shape[2:])
    forward = _kernels().forward if _has_kernels(picture) else _plain_forward
    forward(prompt, prompt_weight, angles[:tokens], eps, out=result[:, :tokens])
    forward(picture, weight, angles[tokens:], eps, out=result[:, tokens:])
    return result


def _backward(
    gradient: Tensor,
    prompt: Tensor,
    picture: Tensor,
    prompt_weight: Tensor,
    weight: Tensor,
    angles: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor]:
    tokens = prompt.shape[1]
    backward = _kernels().backward if _has_kernels(picture) else _plain_backward
    return (
        backward(gradient[:, :tokens], prompt, prompt_weight, angles[:tokens], eps),
        backward(gradient[:, tokens:], picture, weight, angles[tokens:], eps),
    )


def _plain_forward(x: Tensor, weight: Tensor, angles: Tensor, eps: float, out: Tensor) -> None:
    y = torch.mul(x, _inverse_root(x, eps), out=torch.empty_like(x)).mul_(weight)  # makes no float32 copy
    turned = torch.view_as_complex(y.float().unflatten(-1, (-1, 2))).mul_(_complex(angles))
    out.copy_(torch.view_as_real(turned).flatten(-2))


def _plain_backward(gradient: Tensor, x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    parts = gradient.float().contiguous().unflatten(-1, (-1, 2))
    turned = torch.view_as_complex(parts) * _complex(angles).conj()
    back = torch.view_as_real(turned).flatten(-2).to(x.dtype).mul_(weight).float()
    inverse = _inverse_root(x, eps)
    along = (back * x).mean(-1, keepdim=True).mul_(inverse.square())
    return back.addcmul_(x, along, value=-1).mul_(inverse).to(x.dtype)


def _inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) [..., 1] in float32, for x [..., d]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _complex(angles: Tensor) -> Tensor:
    """Angles [L, d / 2, 2] as complex numbers [L, 1, d / 2], for all heads."""
    return torch.view_as_complex(angles).unsqueeze(1)


def _has_kernels(x: Tensor) -> bool:
    return x.is_cuda and _kernels_work(x.device, x.dtype, x.shape[-1])


@cache
def _kernels_work(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernels run on a card. Triton may be missing, find no C compiler, or not support the card."""
    is_power_of_2 = not width & (width - 1)
    if find_spec("triton") is None or not is_power_of_2:
        return False
    x, weight = torch.ones(1, 2, 3, width, device=device, dtype=dtype), torch.ones(width, device=device, dtype=dtype)
    angles = torch.ones(2, width // 2, 2, device=device)
    try:
        _kernels().forward(x, weight, angles, 1e-6, out=torch.empty_like(x))
        _kernels().backward(x, x, weight, angles, 1e-6)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a compiler raises
        text = "Queries and keys are computed without Triton, which fails on this machine (%s: %s)."
        _LOG.info(text, type(error).__name__, reason_of(error))
        return False
    return True


@cache
def _kernels() -> Any:
    return import_module(".query_key_kernels", __package__)


def _joined_shape(prompt: Tensor, picture: Tensor, *_: Any) -> Tensor:
    return picture.new_empty(1, prompt.shape[1] + picture.shape[1], *picture.shape[2:])


def _parts_shape(gradient: Tensor, prompt: Tensor, picture: Tensor, *_: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return (
        torch.empty_like(prompt, memory_format=torch.contiguous_format),
        torch.empty_like(picture, memory_format=torch.contiguous_format),
    )


_INPUTS = "Tensor prompt, Tensor picture, Tensor prompt_weight, Tensor weight, Tensor angles, float eps"
_OPERATORS = {
    f"forward({_INPUTS}) -> Tensor": (_forward, _joined_shape),
    f"backward(Tensor gradient, {_INPUTS}) -> (Tensor, Tensor)": (_backward, _parts_shape),
}


def define_operators() -> None:
    """Make the operators known to torch, once in a process. Compiled blocks need them."""
    define(_NAMESPACE, "CompositeExplicitAutograd", _OPERATORS)
