"""A frozen RMS norm that gradients pass through and that keeps little for its backward pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.normalization import RMSNorm


class FrozenRMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps), in x's dtype, times weight [d]; x and y [..., d]. Only x gets a gradient.

    Computes what diffusers' RMSNorm computes, with that norm's weight. RMSNorm also keeps x in float32: for a block's
    queries and keys, that is a fifth of the activations that the block keeps.
    """

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        """x [..., d] to y [..., d]."""
        return _Normalised.apply(x, self.weight, self.eps)  # type: ignore[no-untyped-call]


class _Normalised(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        inverse = inverse_root(x, eps)
        ctx.save_for_backward(x, weight, inverse)
        if torch.compiler.is_compiling():
            # Compiled by torch 2.11, the gradient is zero if the last operation writes in place.
            return (x * inverse).to(x.dtype) * weight
        return torch.mul(x, inverse, out=torch.empty_like(x)).mul_(weight)  # makes no float32 copy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        return input_gradient((gradients[0] * weight).float(), x, inverse), None, None


def inverse_root(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps) [..., 1] in float32, for x [..., d]."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def input_gradient(gradient: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """The gradient of x in x's dtype, from that of x * `inverse_root(x)` in float32, which is overwritten."""
    along = (gradient * x).mean(-1, keepdim=True).mul_(inverse.square())
    return gradient.addcmul_(x, along, value=-1).mul_(inverse).to(x.dtype)
