"""Sizes and rectangles of pictures, in pixels. Sizes are (width, height), rectangles (left, top, right, bottom)."""

from __future__ import annotations

import math
from typing import NamedTuple

CropPosition = tuple[float, float]  # 0 is left or top, 1 is right or bottom
CENTRE: CropPosition = (0.5, 0.5)
_ROUNDING = 32  # pixels: training sizes are rounded to multiples of at most this


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class Box(NamedTuple):
    """A rectangle. `right` and `bottom` are exclusive. Sides may lie within a pixel; whole numbers are ints."""

    left: float
    top: float
    right: float
    bottom: float

    @property
    def width(self) -> float:
        """Distance from left to right."""
        return self.right - self.left

    @property
    def height(self) -> float:
        """Distance from top to bottom."""
        return self.bottom - self.top

    @property
    def size(self) -> tuple[float, float]:
        """Width and height of the rectangle."""
        return self.width, self.height

    @property
    def is_whole(self) -> bool:
        """Whether no side cuts through a pixel."""
        return all(isinstance(side, int) for side in self)


def bucket_size(size: Size, resolution: int, step: int = 32) -> Size:
    """The training size for a picture of `size`: its aspect ratio, about `resolution`² pixels, multiples of `step`."""
    return scaled_size(size, resolution / math.sqrt(size.width * size.height), step)


def scaled_size(size: Size, scale: float, step: int) -> Size:
    """`size` times `scale`, with each side rounded to a multiple of `step` and at least one step long."""
    return Size(*(max(step, round(side * scale / step) * step) for side in size))


def area_size(size: tuple[float, float], area: int, step: int = 1) -> Size:
    """`size` scaled to about `area` pixels, with each side rounded to a multiple of `step`.

    Equal to what ComfyUI's TextEncodeQwenImageEdit (step 1) and TextEncodeQwenImageEditPlus (step 8) compute
    (comfy_extras/nodes_qwen.py). The order of the float operations is theirs, so that rounding agrees too.
    """
    scale = math.sqrt(area / (size[0] * size[1]))
    return Size(*(max(step, round(side * scale / float(step)) * step) for side in size))


def aspect_area_size(size: tuple[float, float], area: int, step: int = 32) -> Size:
    """The size that `calculate_dimensions` of diffusers' Qwen edit pipelines returns for `area` pixels."""
    ratio = size[0] / size[1]
    width = math.sqrt(area * ratio)
    return Size(*(max(step, round(side / step) * step) for side in (width, width / ratio)))


def differ_by_rounding(size: Size, other: Size) -> bool:
    """Whether both sides differ by at most 32 pixels, the largest step to which training sizes are rounded."""
    return all(abs(one - two) <= _ROUNDING for one, two in zip(size, other, strict=True))


def crop_box(size: Size, aspect: Size, position: CropPosition = CENTRE, share: float = 1.0) -> Box:
    """The largest rectangle within `size` that has the aspect ratio of `aspect`, with its sides times `share`.

    `position` places it within `size`: (0, 0) is top left, (1, 1) bottom right, and the default is the centre.
    """
    if size.width * aspect.height > size.height * aspect.width:
        width, height = max(1, round(size.height * aspect.width / aspect.height)), size.height
    else:
        width, height = size.width, max(1, round(size.width * aspect.height / aspect.width))
    width, height = max(1, round(width * share)), max(1, round(height * share))
    left, top = int((size.width - width) * position[0]), int((size.height - height) * position[1])
    return Box(left, top, left + width, top + height)


def kept_share(size: Size, aspect: Size) -> float:
    """The share of its area that a picture of `size` keeps when it is cropped to the aspect ratio of `aspect`."""
    ratio = (size.width * aspect.height) / (size.height * aspect.width)
    return min(ratio, 1 / ratio)


def scale_box(box: Box, source: Size, destination: Size) -> Box:
    """Convert `box` from a picture of size `source` to the same picture at size `destination`, without rounding."""
    sides = (side * new / old for side, new, old in zip(box, destination * 2, source * 2, strict=True))
    return Box(*(int(side) if side.is_integer() else side for side in sides))


def same_shape(size: Size, other: Size) -> bool:
    """Whether `other` can be `size` resized without cropping: equal aspect ratios up to rounding to whole pixels."""
    least = max((other.width - 1) / size.width, (other.height - 1) / size.height)
    most = min((other.width + 1) / size.width, (other.height + 1) / size.height)
    return least <= most


def similar_shape(size: Size, other: Size, tolerance: float = 0.05) -> bool:
    """Whether the aspect ratios differ by at most `tolerance` (relative). 5 % covers the rounding of small sizes."""
    return abs((size.width * other.height) / (size.height * other.width) - 1) <= tolerance


def same_framing(target: Size, reference: Size) -> bool:
    """Whether the aspect ratios differ by at most 1 %, so that both pictures are taken to show the same scene."""
    return similar_shape(reference, target, 0.01)
