"""Resize pictures by averaging the pixels that each new pixel covers."""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..geometry import Box, Size


def resize_area(picture: Image.Image, box: Box, size: Size) -> Tensor:
    """The part of an 8-bit picture inside `box`, resized to `size`: [C, H, W] in 0..1.

    A box of whole pixels is resized with torch's `area`, as in ComfyUI. That counts a pixel fully even if the new pixel
    covers only a part of it, which would move a box whose sides lie within pixels. There, pixels count by the part that
    is covered. Where every new pixel covers whole pixels, both give the same result.
    """
    left, top = math.floor(box.left), math.floor(box.top)
    inside = np.asarray(picture)[top : math.ceil(box.bottom), left : math.ceil(box.right)]  # crop warns of large ones
    values = inside.astype(np.float32) / 255
    pixels = torch.from_numpy(np.atleast_3d(values)).permute(2, 0, 1).contiguous()
    if box.is_whole:
        return interpolate(pixels[None], size=(size.height, size.width), mode="area")[0]
    rows = _covered(pixels, box.top - top, box.bottom - top, size.height)
    return _covered(rows.mT, box.left - left, box.right - left, size.width).mT.contiguous()


def _covered(pixels: Tensor, begin: float, end: float, count: int) -> Tensor:
    """Averages [C, count, W] of the rows [C, H, W] between `begin` and `end`, each over an equal part of that range."""
    edges = torch.linspace(begin, end, count + 1, dtype=torch.float64)
    above, below = edges[:-1], edges[1:]
    total = torch.zeros(pixels.shape[0], count, pixels.shape[2])
    for number in range(math.ceil((end - begin) / count) + 1):
        row = above.floor() + number
        share = (torch.minimum(below, row + 1) - torch.maximum(above, row)).clamp_min(0) / (below - above)
        total += pixels[:, row.long().clamp_max(pixels.shape[1] - 1)] * share.float()[:, None]
    return total
