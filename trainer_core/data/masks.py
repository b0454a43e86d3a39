"""Masks: pictures that weight the loss, resized to the size of the latents."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image, ImageChops
from torch import Tensor

from ..errors import DatasetError
from ..geometry import Box, Size, similar_shape
from ..text import shown
from .area import resize_area
from .images import Picture, read_checked

MaskSource = Literal["grey", "even", "hole", "paint"]
_SHAPE_TOLERANCE = 0.01  # a mask must cover the same pixels as its target
_VISIBLE = 32  # alpha from which a pixel's colour counts; below it the colour may be rounded or lossy
_OPAQUE = 255 - _VISIBLE  # alpha from which a picture counts as opaque: alpha saved with loss is not 255 everywhere
_ONE_COLOUR = 12  # of 255: the largest range of each channel in paint of one colour
_COLOURED = 32  # of 255: the largest difference between the channels of a pixel that counts as grey
_NEAR = 0.125  # of the brightest grey value: how far a level that counts as black or as the brightest may lie from it
_SOFT = 0.25  # of the pixels; feathered masks have less grey
_COLOURED_SHARE = 0.05  # of the pixels that aren't black; the noise of a JPEG stays below


class PairMask(NamedTuple):
    """A picture of loss weights: white counts fully, black not at all. The model never sees it."""

    path: Path
    digest: str
    size: Size


class MaskSpread(NamedTuple):
    """How the weights of a mask are spread.

    `brightest` is its largest grey value, 0 to 255. `grey` is the share of pixels that are clearly brighter than black
    and clearly darker than `brightest`. `low` and `high` are the weights, relative to their mean, between which all but
    the darkest and the brightest tenth of the pixels lie; 0 for a black mask.
    """

    brightest: int
    grey: float
    low: float
    high: float

    @property
    def is_soft(self) -> bool:
        """Whether much of the mask is grey, as in a gradient, or in a photo that was mistaken for a mask."""
        return self.grey > _SOFT


class MaskGrey(NamedTuple):
    """A mask's weights as a picture of mode L, and where they come from.

    grey: the brightness. even: also the brightness, of a picture that is opaque or equally transparent. hole: the
    transparency of a picture, which ComfyUI's mask editor saves and LoadImage shows as MASK. paint: the opacity of a
    layer that has only one colour.
    """

    grey: Image.Image
    source: MaskSource


def mask_grey(picture: Picture, path: Path) -> MaskGrey:
    """The weights of a mask. Its colour profile has no effect.

    Raises:
        DatasetError: the picture is coloured or wholly transparent, so it can't be a mask.
    """
    if picture.alpha is not None:
        low, high = picture.alpha.getextrema()
        if high < _VISIBLE:
            raise DatasetError(
                f"{shown(path)}: the mask is wholly transparent. Paint the parts that count white on black, without "
                "transparency."
            )
        if low != high and low < _OPAQUE:
            is_paint = _one_colour(picture.pixels, picture.alpha)
            return MaskGrey(picture.alpha, "paint") if is_paint else MaskGrey(ImageChops.invert(picture.alpha), "hole")
    if _is_coloured(picture.pixels):
        raise DatasetError(
            f"{shown(path)}: this is a coloured picture, not a mask. Save the mask in grey: white counts in the loss, "
            "black does not. A picture with a transparent hole, as ComfyUI's mask editor saves it, is a mask too."
        )
    return MaskGrey(picture.pixels.convert("L"), "grey" if picture.alpha is None else "even")


def mask_spread(grey: Image.Image) -> MaskSpread:
    """How the weights of a mask of mode L are spread."""
    counts, levels = np.array(grey.histogram()), np.arange(256)
    brightest = int(np.flatnonzero(counts)[-1])
    between = (levels > brightest * _NEAR) & (levels < brightest * (1 - _NEAR))
    mean = float(levels @ counts) / counts.sum() or 1.0
    low, high = np.searchsorted(counts.cumsum(), counts.sum() * np.array([0.1, 0.9]))
    return MaskSpread(brightest, float(counts[between].sum() / counts.sum()), float(low / mean), float(high / mean))


def checked_mask_grey(mask: PairMask) -> Image.Image:
    """`mask_grey` of a mask's file, as a picture of mode L.

    Raises:
        DatasetError: the file has changed since it was checked, or can't be read.
    """
    return mask_grey(read_checked(mask.path, mask.digest), mask.path).grey


def _one_colour(pixels: Image.Image, alpha: Image.Image) -> bool:
    visible = alpha.point([0 if level < _VISIBLE else 255 for level in range(256)])
    counts = np.array(pixels.histogram(visible)).reshape(3, 256)
    found = [np.flatnonzero(channel) for channel in counts]
    return all(len(levels) == 0 or levels[-1] - levels[0] <= _ONE_COLOUR for levels in found)


def _is_coloured(pixels: Image.Image) -> bool:
    red, green, blue = pixels.split()
    brightest = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    darkest = ImageChops.darker(ImageChops.darker(red, green), blue)
    coloured = sum(ImageChops.subtract(brightest, darkest).histogram()[_COLOURED + 1 :])
    return coloured > _COLOURED_SHARE * sum(brightest.histogram()[_COLOURED + 1 :])


def mask_problem(mask: PairMask, target: Size, spread: MaskSpread | None) -> str:
    """Why a mask can't be used with its target; empty if it can."""
    size = mask.size
    if not similar_shape(size, target, _SHAPE_TOLERANCE):
        return (
            f"{shown(mask.path)}: the mask is {size.width} x {size.height}, but its target is {target.width} x "
            f"{target.height}. Give it the target's aspect ratio; the size may differ."
        )
    if spread is not None and spread.brightest == 0:
        return (
            f"{shown(mask.path)}: the mask is all black, so nothing would be learned. Paint the parts that count white."
        )
    return ""


def loss_weights(mask: PairMask, box: Box, latents: Size) -> Tensor:
    """Loss weights [1, H, W] with mean 1: the mask inside `box`, averaged over the pixels of each latent.

    Raises:
        DatasetError: the mask is all black inside `box`, or its file has changed since it was checked.
    """
    weights = resize_area(checked_mask_grey(mask), box, latents)
    if float(weights.max()) == 0:
        raise DatasetError(
            f"{shown(mask.path)}: the mask is all black in the part of the picture that is trained. Paint the parts "
            "that count white, or crop less."
        )
    return weights / weights.mean()
