"""Makes the frozen transformer compute and keep less than diffusers' does in training, with the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..precision.frozen_norm import FrozenRMSNorm

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


def optimise_frozen_forward(transformer: QwenImageTransformer2DModel) -> None:
    """Replace parts of a frozen network in place; the output stays the same.

    - The last block's text stream after attention is removed: nothing uses its output.
    - The norms of queries and keys no longer keep float32 copies of their inputs.
    - The modulation no longer builds a scale and a shift for every token.
    """
    last = transformer.transformer_blocks[-1]
    last.attn.to_add_out, last.txt_norm2, last.txt_mlp = (torch.nn.Identity() for _ in range(3))
    for block in transformer.transformer_blocks:
        block._modulate = _modulated
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(block.attn, name, FrozenRMSNorm(getattr(block.attn, name)))


def _modulated(x: Tensor, parameters: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B, L, d] scaled and shifted, and the gate: the same as diffusers' `_modulate`.

    `parameters` [B, 3 d] are shift, scale and gate. With `index` [B, L] (in a 2511) they are [2 B, 3 d]: tokens with
    index 0 use the first half, the others the second.

    A function rather than a method, so that compiled blocks share its code.
    """
    if index is None:
        shift, scale, gate = parameters.unsqueeze(1).chunk(3, dim=-1)
        return x * (1 + scale) + shift, gate
    first, second = parameters.chunk(2)
    (x_first, gate_first), (x_second, gate_second) = _modulated(x, first), _modulated(x, second)
    is_first = (index == 0).unsqueeze(-1)
    return torch.where(is_first, x_first, x_second), torch.where(is_first, gate_first, gate_second)
