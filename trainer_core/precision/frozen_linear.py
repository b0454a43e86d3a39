"""A frozen linear layer with fp8 or int8 codes, from a model file or from quanto, that gradients pass through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..weights.stored import StoredWeight, dequantise


class FrozenLinear(nn.Linear):
    """y = x · dequantised(weight)ᵀ + bias, x [..., in], y [..., out]. Only x gets a gradient.

    Forward and backward each dequantise the weight to x's dtype, so that only codes and scales stay in memory. x is not
    kept for the backward pass, because a frozen weight has no gradient.

    With `rounds_input`, x is rounded to the codes' 8-bit format first, with one scale per token. The backward pass
    ignores the rounding (a straight-through estimator).
    """

    rounds_input = False

    def __init__(self, stored: StoredWeight, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.codes.shape
        self.rotation = stored.rotation
        self.weight = nn.Parameter(stored.codes, requires_grad=False)
        scale = torch.ones((), device=stored.codes.device) if stored.scale is None else stored.scale
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] as a new tensor of `dtype`."""
        return dequantise(self.weight, self.get_buffer("scale"), self.rotation, dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """x [..., in] to y [..., out]."""
        x = _Rounded.apply(input, self.weight.dtype) if self.rounds_input else input  # type: ignore[no-untyped-call]
        return _Product.apply(x, self.weight, self.scale, self.rotation, self.bias)  # type: ignore[no-untyped-call]


def rounded_tokens(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x [..., in] rounded to int8 or fp8 with one scale per token, in x's dtype again."""
    largest = torch.finfo(dtype).max if dtype.is_floating_point else torch.iinfo(dtype).max
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny) / largest
    codes = x.float() / scale
    codes = codes.to(dtype).float() if dtype.is_floating_point else codes.round()
    return codes.mul_(scale).to(x.dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ARG004 - autograd's form
        return rounded_tokens(x, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ARG004
        return gradients[0], None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, rotation: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.rotation = rotation
        return functional.linear(x, dequantise(codes, scale, rotation, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        gradient = gradients[0]
        return gradient @ dequantise(codes, scale, ctx.rotation, gradient.dtype), None, None, None, None


def dense_weight(layer: nn.Module) -> Tensor:
    """The weight [out, in] of a linear layer of any precision. A quantised weight is dequantised on every call."""
    weight: Any = layer.weight
    if isinstance(layer, FrozenLinear):
        return layer.dequantised(torch.float32)
    if getattr(weight, "quant_state", None) is not None:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(weight.data, weight.quant_state)
    return weight.dequantize().detach() if hasattr(weight, "qtype") else weight.detach()
