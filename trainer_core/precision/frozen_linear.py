"""A linear layer that keeps a file's own fp8 or int8 codes and trains through them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..weights.stored import StoredWeight, dequantise


class FrozenLinear(nn.Linear):
    """y = x · dequantised(weight)ᵀ + bias, x [..., in], y [..., out]. Only x gets a gradient.

    The weight is dequantised anew in the forward and in the backward pass, to the arithmetic's dtype, so that nothing
    but codes and scales stays in memory.
    """

    def __init__(self, stored: StoredWeight, bias: Tensor | None) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.codes.shape
        self.rotation = stored.rotation
        self.weight = nn.Parameter(stored.codes, requires_grad=False)
        scale = torch.ones((), device=stored.codes.device) if stored.scale is None else stored.scale
        self.register_buffer("scale", scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def dequantised(self, dtype: torch.dtype) -> Tensor:
        """The weight [out, in] in ordinary numbers, made anew."""
        return dequantise(self.weight, self.get_buffer("scale"), self.rotation, dtype)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - nn.Linear's name
        """See the class."""
        kind = input.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else input.dtype
        output: Tensor = _Product.apply(input.to(dtype), self.weight, self.scale, self.rotation)  # type: ignore[no-untyped-call]
        return output if self.bias is None else output + self.bias.to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor, rotation: int) -> Tensor:
        ctx.save_for_backward(codes, scale)
        ctx.rotation = rotation
        return functional.linear(x, dequantise(codes, scale, rotation, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale = ctx.saved_tensors
        gradient = gradients[0]
        return gradient @ dequantise(codes, scale, ctx.rotation, gradient.dtype), None, None, None
