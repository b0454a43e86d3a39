"""Queries and keys of a block: normalised per head, rotated by their positions, and those of prompt and picture joined.

Shapes: T prompt tokens, L picture tokens, H heads, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..precision.frozen_norm import FrozenRMSNorm, input_gradient, inverse_root


def joined(prompt: Tensor, picture: Tensor, prompt_norm: FrozenRMSNorm, norm: FrozenRMSNorm, angles: Tensor) -> Tensor:
    """Queries or keys of prompt [1, T, H, d] and picture [1, L, H, d] as one tensor [1, T + L, H, d].

    `angles` are the cosines and sines [T + L, d / 2, 2] in float32. A compiled block computes the parts on their own,
    because the compiler writes both into the joined tensor. Otherwise they are joined first, which needs fewer kernels.
    """
    if not torch.compiler.is_compiling():
        weights = prompt_norm.weight, norm.weight
        return _NormalisedAndRotated.apply(prompt, picture, *weights, norm.eps, angles)  # type: ignore[no-untyped-call]
    tokens = prompt.shape[1]
    return torch.cat(
        [rotated(prompt_norm(prompt), angles[:tokens]), rotated(norm(picture), angles[tokens:])],
        dim=1,
    )


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """x [1, L, H, d] with neighbouring elements rotated like complex numbers, in float32. `angles` [L, d / 2, 2].

    Each element is read with its neighbour's sine, so the compiler needs neither complex numbers, for which it
    generates no code, nor two halves that are interleaved at the end.
    """
    cosine, sine = (part.repeat_interleave(2, dim=-1).unsqueeze(1) for part in angles.unbind(-1))
    signs = torch.tensor([-1.0, 1.0], device=x.device).repeat(x.shape[-1] // 2)
    neighbour = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return (x.float() * cosine + neighbour.float() * (sine * signs)).type_as(x)


class _NormalisedAndRotated(torch.autograd.Function):
    """`joined` in as few operations as possible. Never compiled, so it may write in place."""

    @staticmethod
    def forward(
        ctx: Any,
        prompt: Tensor,
        picture: Tensor,
        prompt_weight: Tensor,
        weight: Tensor,
        eps: float,
        angles: Tensor,
    ) -> Tensor:
        tokens, x = prompt.shape[1], torch.cat([prompt, picture], dim=1)
        inverse = inverse_root(x, eps)
        ctx.save_for_backward(x, inverse, prompt_weight, weight, angles)
        ctx.tokens = tokens
        y = torch.mul(x, inverse, out=torch.empty_like(x))
        y[:, :tokens].mul_(prompt_weight)
        y[:, tokens:].mul_(weight)
        turned = torch.view_as_complex(y.float().unflatten(-1, (-1, 2))).mul_(_complex(angles))
        return torch.view_as_real(turned).flatten(-2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, inverse, prompt_weight, weight, angles = ctx.saved_tensors
        parts = gradients[0].float().contiguous().unflatten(-1, (-1, 2))
        turned = torch.view_as_complex(parts) * _complex(angles).conj()
        gradient = torch.view_as_real(turned).flatten(-2).to(x.dtype)
        gradient[:, : ctx.tokens].mul_(prompt_weight)
        gradient[:, ctx.tokens :].mul_(weight)
        gradient = input_gradient(gradient.float(), x, inverse)
        return (
            gradient[:, : ctx.tokens].contiguous(),
            gradient[:, ctx.tokens :].contiguous(),
            *(None,) * 4,
        )


def _complex(angles: Tensor) -> Tensor:
    """Angles [L, d / 2, 2] as complex numbers [L, 1, d / 2], for all heads."""
    return torch.view_as_complex(angles).unsqueeze(1)
