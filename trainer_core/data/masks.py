"""Masks: pictures that weight the loss, resized to the size of the latents."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..errors import DatasetError
from ..geometry import Box, Size, similar_shape
from .images import open_checked_picture, shown

_SHAPE_TOLERANCE = 0.01  # a mask must cover the same pixels as its target


class PairMask(NamedTuple):
    """A picture of loss weights: white counts fully, black not at all. The model never sees it."""

    path: Path
    digest: str
    size: Size


def mask_problem(mask: PairMask, target: Size, brightest: int) -> str:
    """Why a mask can't be used with its target; empty if it can. `brightest` is the mask's largest grey value."""
    size = mask.size
    if not similar_shape(size, target, _SHAPE_TOLERANCE):
        return (
            f"{shown(mask.path)}: the mask is {size.width} x {size.height}, but its target is {target.width} x "
            f"{target.height}. Give it the target's aspect ratio; the size may differ."
        )
    if brightest == 0:
        return (
            f"{shown(mask.path)}: the mask is all black, so nothing would be learned. Paint the parts that count white."
        )
    return ""


def loss_weights(mask: PairMask, box: Box, latents: Size) -> Tensor:
    """Loss weights [1, H, W] with mean 1: the mask inside `box`, averaged over the pixels of each latent.

    Raises:
        DatasetError: the mask is all black inside `box`, or its file has changed since it was checked.
    """
    grey = np.asarray(open_checked_picture(mask.path, mask.digest).convert("L").crop(box), dtype=np.float32) / 255.0
    pixels = torch.from_numpy(grey)[None, None]
    weights = interpolate(pixels, size=(latents.height, latents.width), mode="area")[0]
    if float(weights.max()) == 0:
        raise DatasetError(
            f"{shown(mask.path)}: the mask is all black in the part of the picture that is trained. Paint the parts "
            "that count white, or crop less."
        )
    return weights / weights.mean()
