"""Makes a transformer compute as ComfyUI does, for LoRAs that will be used there, and has ComfyUI's rotary positions.

diffusers and ComfyUI assign equal positions if sides are even and no reference is larger than the target. Otherwise
they differ in two ways. A side of n tokens starts at -(n // 2) in ComfyUI and at -(n - n // 2) in diffusers. The prompt
starts where the target ends in ComfyUI, and where the largest of target and references ends in diffusers.
Source: comfy/ldm/qwen_image/model.py, diffusers' transformer_qwenimage.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

Shape = tuple[int, int, int]  # frames, rows, columns of one picture's tokens
_SIZES_HELD = 8  # sizes whose frequencies are cached on the device; each takes 4 MiB at 1 megapixel with a reference
_PROMPTS_ALIKE = 256  # prompt lengths are rounded up to multiples of this many tokens, to share cached frequencies


class ComfyuiPositions(nn.Module):
    """Replaces a transformer's `pos_embed`, and uses the replaced module to compute frequencies."""

    def __init__(self, replaced: Any) -> None:
        super().__init__()
        self._replaced = replaced
        self._cached_pictures = lru_cache(maxsize=_SIZES_HELD)(self._pictures)
        self._cached_prompt = lru_cache(maxsize=_SIZES_HELD)(self._prompt)

    def forward(
        self, img_shapes: Sequence[Sequence[Shape]], max_txt_seq_len: int, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Complex frequencies of the picture tokens and of `max_txt_seq_len` prompt tokens, on `device`.

        All samples of a batch must have the shapes of the first one, as in diffusers.
        """
        shapes, length = tuple(img_shapes[0]), int(max_txt_seq_len)
        start = max(side // 2 for side in shapes[0][1:])
        rounded = -(-length // _PROMPTS_ALIKE) * _PROMPTS_ALIKE
        return self._cached_pictures(shapes, device), self._cached_prompt(start, rounded, device)[:length]

    def _pictures(self, shapes: tuple[Shape, ...], device: torch.device) -> Tensor:
        pictures = []
        for index, (_, rows, columns) in enumerate(shapes):
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            pictures.append(self._at(torch.full_like(row, index), row - rows // 2, column - columns // 2))
        return torch.cat(pictures).to(device)

    def _prompt(self, start: int, tokens: int, device: torch.device) -> Tensor:
        prompt = torch.arange(start, start + tokens)
        return self._at(prompt, prompt, prompt).to(device)

    def _at(self, *positions: Tensor) -> Tensor:
        axes = zip(positions, self._replaced.axes_dim, strict=True)
        return torch.cat([self._replaced.rope_params(each.flatten(), size) for each, size in axes], dim=1)


def follow_comfyui(transformer: Any) -> None:
    """Make a transformer use ComfyUI's positions and rounding from now on, in place of those of the pipelines."""
    transformer.pos_embed = ComfyuiPositions(transformer.pos_embed)


def follows_comfyui(transformer: Any) -> bool:
    """Whether `follow_comfyui` was called for this transformer."""
    return isinstance(transformer.pos_embed, ComfyuiPositions)
