"""Masks: pictures of the loss's weight, brought to the size of the latents."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import DatasetError
from ..geometry import Box, Size
from .images import open_checked_picture, shown

_SAME_SHAPE = 0.01  # relative; a mask belongs to its target's pixels


class PairMask(NamedTuple):
    """A picture of the loss's weight, white for all and black for none. Never shown to the model."""

    path: Path
    digest: str
    size: Size


def mask_problem(mask: PairMask, target: Size, brightest: int) -> str:
    """Why a mask doesn't fit its target, or weighs nothing; empty if it is usable. `brightest`: its largest value."""
    size = mask.size
    if abs((size.width * target.height) / (size.height * target.width) - 1) > _SAME_SHAPE:
        return (
            f"{shown(mask.path)}: the mask is {size.width} x {size.height}, its target {target.width} x "
            f"{target.height}. Give it the target's shape; the size may differ."
        )
    if brightest == 0:
        return f"{shown(mask.path)}: the mask is all black, so that nothing would be learned. Paint white what counts."
    return ""


def loss_weights(mask: PairMask, box: Box, latents: Size) -> Tensor:
    """Weights [1, H, W] of the latents' loss, their mean 1: the mask's rectangle, averaged over each latent's pixels.

    Raises:
        DatasetError: the rectangle is all black, or the file is not that of `mask` any more.
    """
    grey = np.asarray(open_checked_picture(mask.path, mask.digest).convert("L").crop(box), dtype=np.float32) / 255.0
    pixels = torch.from_numpy(grey)[None, None]
    weights = interpolate(pixels, size=(latents.height, latents.width), mode="area")[0]
    if float(weights.max()) == 0:
        raise DatasetError(
            f"{shown(mask.path)}: the mask is all black in the part of the picture that is trained. Paint white what "
            "counts, or crop less."
        )
    return weights / weights.mean()
