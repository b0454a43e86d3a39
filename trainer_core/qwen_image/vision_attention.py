"""The vision tower's attention with one call per window size; transformers makes one call per window and picture."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def attend_in_batches(tower: nn.Module) -> None:
    """Replace the attention of all blocks of Qwen2.5-VL's vision tower, in place. Results differ by rounding only.

    A picture of a megapixel has a hundred windows per block, so launching kernels took most of the tower's time.
    """
    windows = _Windows()
    blocks: Any = tower.blocks
    for block in blocks:
        block.attn.forward = partial(_attention, block.attn, windows)


class _Windows:
    """Row numbers of the windows that `cu_seqlens` describes; keeps the last two answers, because blocks share them."""

    def __init__(self) -> None:
        self._known: list[tuple[Tensor, list[Tensor]]] = []

    def rows(self, cu_seqlens: Tensor) -> list[Tensor]:
        """For each window length a tensor [windows, length] of row numbers, on the device of `cu_seqlens`."""
        for known, found in self._known:
            if known is cu_seqlens:
                return found
        ends: list[int] = cu_seqlens.tolist()
        starts: dict[int, list[int]] = {}
        for start, end in pairwise(ends):
            starts.setdefault(end - start, []).append(start)
        found = [
            (torch.tensor(first).unsqueeze(1) + torch.arange(length)).to(cu_seqlens.device)
            for length, first in starts.items()
        ]
        self._known = [*self._known[-1:], (cu_seqlens, found)]
        return found


def _attention(
    attention: Any,
    windows: _Windows,
    hidden_states: Tensor,
    cu_seqlens: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    **_: object,
) -> Tensor:
    """Attention of patches [N, D] within their windows. The arguments are those of transformers."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb_vision

    query, key, value = attention.qkv(hidden_states).view(len(hidden_states), 3, attention.num_heads, -1).unbind(1)
    query, key = apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    attended = torch.empty_like(value)
    for rows in windows.rows(cu_seqlens):
        of_windows = [each[rows].transpose(1, 2) for each in (query, key, value)]  # [windows, heads, length, width]
        attended[rows] = scaled_dot_product_attention(of_windows[0], of_windows[1], of_windows[2]).transpose(1, 2)
    return attention.proj(attended.flatten(1))
