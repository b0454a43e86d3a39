"""A transformer that computes and keeps less than diffusers' while it is trained through, with the same result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..precision.frozen_norm import FrozenRMSNorm

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


def optimise_frozen_forward(transformer: QwenImageTransformer2DModel) -> None:
    """Have a frozen network compute and keep less, with the same result: nobody reads what the last block computes of
    the text after its attention, norms of queries and keys need not keep them in float32, and a picture's modulation
    not a scale for every token."""
    last = transformer.transformer_blocks[-1]
    last.attn.to_add_out, last.txt_norm2, last.txt_mlp = (torch.nn.Identity() for _ in range(3))
    for block in transformer.transformer_blocks:
        block._modulate = _modulated
        for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            setattr(block.attn, name, FrozenRMSNorm(getattr(block.attn, name)))


def _modulated(x: Tensor, parameters: Tensor, index: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x [B, L, d] scaled and shifted, and the gate, as diffusers' `_modulate` gives them.

    `parameters` [B, 3 d] hold shift, scale and gate. With an `index` [B, L], as in a 2511, they are [2 B, 3 d], and
    tokens of index 0 take those of the first half.

    One function for all blocks, as compiled ones share their code.
    """
    if index is None:
        shift, scale, gate = parameters.unsqueeze(1).chunk(3, dim=-1)
        return x * (1 + scale) + shift, gate
    first, second = parameters.chunk(2)
    (x_first, gate_first), (x_second, gate_second) = _modulated(x, first), _modulated(x, second)
    is_first = (index == 0).unsqueeze(-1)
    return torch.where(is_first, x_first, x_second), torch.where(is_first, gate_first, gate_second)
