"""Prepares pictures for Qwen2.5-VL's vision tower: patches of 14 pixels, merged 2 by 2 into one token."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from .prompt import IMAGE_PAD

PATCH, MERGE, FRAMES = 14, 2, 2
MIN_PIXELS, MAX_PIXELS = 3136, 12_845_056
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def vision_size(height: int, width: int) -> tuple[int, int]:
    """The height and width at which the vision tower sees a picture: multiples of 28 pixels within its limits.

    Source: `process_qwen2vl_images` in ComfyUI's comfy/text_encoders/qwen_vl.py, Qwen2-VL's "smart resize".
    """
    factor = PATCH * MERGE
    rows, columns = round(height / factor) * factor, round(width / factor) * factor
    if rows * columns > MAX_PIXELS:
        beta = math.sqrt(height * width / MAX_PIXELS)
        return tuple(max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))  # type: ignore[return-value]
    if rows * columns < MIN_PIXELS:
        beta = math.sqrt(MIN_PIXELS / (height * width))
        return tuple(math.ceil(side * beta / factor) * factor for side in (height, width))  # type: ignore[return-value]
    return rows, columns


def vision_patches(picture: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [N, 1176] of a picture [3, H, W] in 0..1, and their grid [1, 3] (frames, rows, columns).

    As ComfyUI's `process_qwen2vl_images`: resized bilinearly to `vision_size`, normalised with CLIP's mean and std.
    """
    size = vision_size(*picture.shape[1:])
    resized = interpolate(picture.unsqueeze(0), size=size, mode="bilinear", align_corners=False)[0]
    mean = torch.tensor(MEAN, dtype=resized.dtype, device=resized.device).view(3, 1, 1)
    std = torch.tensor(STD, dtype=resized.dtype, device=resized.device).view(3, 1, 1)
    return patchify((resized - mean) / std)


def patchify(normalised: Tensor) -> tuple[Tensor, Tensor]:
    """Patches [N, 1176] of a normalised picture [3, H, W], and their grid [1, 3].

    In the vision tower's order: the four patches that merge into one token are next to each other.
    """
    rows, columns = normalised.shape[1] // PATCH, normalised.shape[2] // PATCH
    frames = normalised.unsqueeze(0).expand(FRAMES, -1, -1, -1)
    patches = frames.reshape(FRAMES, 3, rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH)
    patches = patches.permute(2, 5, 3, 6, 1, 0, 4, 7).reshape(rows * columns, 3 * FRAMES * PATCH * PATCH)
    return patches, torch.tensor([[1, rows, columns]], dtype=torch.long)


def num_vision_tokens(grid: Tensor) -> int:
    """The number of prompt tokens of a picture with this grid [1, 3]."""
    return int(grid.prod()) // (MERGE * MERGE)


def rotary_positions(ids: Sequence[int], grids: Sequence[Tensor]) -> Tensor:
    """Positions [3, L] (frame, row, column) for Qwen2.5-VL's rotary embedding.

    Text counts up on all three axes. A picture spans its merged grid from its start position, and the text after it
    continues past the picture's longer side. Computed here because transformers 5 needs an input for this that
    diffusers' pipelines don't pass; without it, the model silently treats pictures as text.
    """
    remaining = list(grids)
    parts: list[Tensor] = []
    position, index = 0, 0
    while index < len(ids):
        if ids[index] == IMAGE_PAD and remaining:
            _, rows, columns = (int(side) // MERGE for side in remaining.pop(0)[0])
            row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            parts.append(torch.stack([torch.zeros_like(row), row, column]).flatten(1) + position)
            index, position = index + rows * columns, position + max(rows, columns)
        else:
            parts.append(torch.full((3, 1), position))
            index, position = index + 1, position + 1
    return torch.cat(parts, dim=1)
