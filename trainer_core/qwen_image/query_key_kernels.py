"""Triton kernels for `query_key`: one pass over memory each. Import it only where Triton is installed."""

# pyright: reportMissingParameterType=false, reportIndexIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..precision.kernels import cdiv, on_device_of

_HEADS = 16  # rows of a program: heads of one or more tokens


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(x, weight, angles, y, rows, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """y = rotate(weight · x / rms(x)) for rows of WIDTH numbers; HEADS rows have the same position."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    is_in = (row < rows)[:, None]
    values = tl.load(x + at, mask=is_in, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)
    # Rounded where torch's own operations round.
    values = (values * inverse[:, None]).to(y.dtype.element_ty).to(tl.float32)
    values = (values * tl.load(weight + column)[None, :].to(tl.float32)).to(y.dtype.element_ty).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(values, (BLOCK, WIDTH // 2, 2)))
    turns = tl.load(angles + (row // HEADS)[:, None] * WIDTH + column[None, :], mask=is_in, other=0)
    cosine, sine = tl.split(tl.reshape(turns, (BLOCK, WIDTH // 2, 2)))
    turned = tl.join(real * cosine - imaginary * sine, real * sine + imaginary * cosine)
    tl.store(y + at, tl.reshape(turned, (BLOCK, WIDTH)).to(y.dtype.element_ty), mask=is_in)


@triton.jit(do_not_specialize=["rows"])
def backward_kernel(
    gradient, x, weight, angles, dx, rows, eps, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """The gradient of x in `forward_kernel` from that of y."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    at = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    is_in = (row < rows)[:, None]
    values = tl.load(x + at, mask=is_in, other=0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(values * values, axis=1) / WIDTH + eps)[:, None]
    given = tl.load(gradient + at, mask=is_in, other=0).to(tl.float32)
    real, imaginary = tl.split(tl.reshape(given, (BLOCK, WIDTH // 2, 2)))
    turns = tl.load(angles + (row // HEADS)[:, None] * WIDTH + column[None, :], mask=is_in, other=0)
    cosine, sine = tl.split(tl.reshape(turns, (BLOCK, WIDTH // 2, 2)))
    turned = tl.join(real * cosine + imaginary * sine, imaginary * cosine - real * sine)
    back = tl.reshape(turned, (BLOCK, WIDTH)).to(dx.dtype.element_ty).to(tl.float32)
    back = (back * tl.load(weight + column)[None, :].to(tl.float32)).to(dx.dtype.element_ty).to(tl.float32)
    along = (tl.sum(back * values, axis=1) / WIDTH)[:, None] * (inverse * inverse)
    tl.store(dx + at, ((back - values * along) * inverse).to(dx.dtype.element_ty), mask=is_in)


def forward(x: Tensor, weight: Tensor, angles: Tensor, eps: float, out: Tensor) -> None:
    """Write x [1, L, H, d], normalised and rotated, to `out`, of the same shape. `angles` [L, d / 2, 2]."""
    _launch(forward_kernel, (x.contiguous(), weight, angles, out), x, eps)


def backward(gradient: Tensor, x: Tensor, weight: Tensor, angles: Tensor, eps: float) -> Tensor:
    """The gradient of x [1, L, H, d] from that of the result."""
    x = x.contiguous()
    dx = torch.empty_like(x)
    _launch(backward_kernel, (gradient.contiguous(), x, weight, angles, dx), x, eps)
    return dx


def _launch(kernel: Any, tensors: tuple[Tensor, ...], x: Tensor, eps: float) -> None:
    _, tokens, heads, width = x.shape
    if rows := tokens * heads:
        with on_device_of(x):
            grid = (cdiv(rows, _HEADS),)
            kernel[grid](*tensors, rows, eps, HEADS=heads, WIDTH=width, BLOCK=_HEADS, num_warps=4)
