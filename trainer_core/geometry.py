"""Sizes and rectangles of pictures. Sizes are (width, height) in pixels, rectangles (left, top, right, bottom)."""

from __future__ import annotations

import math
from typing import NamedTuple

Place = tuple[float, float]
CENTRE: Place = (0.5, 0.5)


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


class Box(NamedTuple):
    """A rectangle of whole pixels; right and bottom lie just outside."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def size(self) -> Size:
        """Width and height of the rectangle."""
        return Size(self.right - self.left, self.bottom - self.top)


def bucket_size(size: Size, resolution: int, step: int = 32) -> Size:
    """The size to train `size` at: about `resolution`² pixels in its own aspect ratio, sides multiples of `step`."""
    return scaled_size(size, resolution / math.sqrt(size.width * size.height), step)


def scaled_size(size: Size, scale: float, step: int) -> Size:
    """`size` times `scale`, each side rounded to a multiple of `step`, at least one step."""
    return Size(*(max(step, round(side * scale / step) * step) for side in size))


def area_size(size: Size, area: int, step: int = 1) -> Size:
    """`size` scaled to about `area` pixels, each side rounded to a multiple of `step`.

    With step 1 and 8 these are the sizes of ComfyUI's TextEncodeQwenImageEdit and ...Plus
    (comfy_extras/nodes_qwen.py), to the last bit of the float arithmetic.
    """
    scale = math.sqrt(area / (size.width * size.height))
    return Size(*(max(step, round(side * scale / float(step)) * step) for side in size))


def aspect_area_size(size: Size, area: int, step: int = 32) -> Size:
    """The same as diffusers' `calculate_dimensions` of the Qwen edit pipelines: aspect first, then rounding."""
    ratio = size.width / size.height
    width = math.sqrt(area * ratio)
    return Size(*(max(step, round(side / step) * step) for side in (width, width / ratio)))


def centre_crop(size: Size, aspect: Size) -> Box:
    """The largest centred rectangle of `size` with the aspect ratio of `aspect`."""
    return crop_box(size, aspect)


def crop_box(size: Size, aspect: Size, place: Place = CENTRE, share: float = 1.0) -> Box:
    """A rectangle of `size` with the aspect ratio of `aspect`: the largest, or a `share` of its sides.

    `place` is where it lies between left and right, top and bottom, each 0 to 1.
    """
    if size.width * aspect.height > size.height * aspect.width:
        width, height = max(1, round(size.height * aspect.width / aspect.height)), size.height
    else:
        width, height = size.width, max(1, round(size.width * aspect.height / aspect.width))
    width, height = max(1, round(width * share)), max(1, round(height * share))
    left, top = int((size.width - width) * place[0]), int((size.height - height) * place[1])
    return Box(left, top, left + width, top + height)


def scale_box(box: Box, source: Size, destination: Size) -> Box:
    """`box` of a picture of size `source`, in the pixels of the same picture at size `destination`."""
    x, y = destination.width / source.width, destination.height / source.height
    left, top = min(round(box.left * x), destination.width - 1), min(round(box.top * y), destination.height - 1)
    return Box(left, top, max(left + 1, round(box.right * x)), max(top + 1, round(box.bottom * y)))


def same_shape(size: Size, other: Size) -> bool:
    """Whether one may be the other resized as a whole: their sides have one ratio but for the rounding to pixels."""
    least = max((other.width - 1) / size.width, (other.height - 1) / size.height)
    most = min((other.width + 1) / size.width, (other.height + 1) / size.height)
    return least <= most


def similar_shape(size: Size, other: Size, tolerance: float = 0.05) -> bool:
    """Whether the aspect ratios differ by at most `tolerance`, relative. 5 % covers the rounding of small sizes."""
    return abs((size.width * other.height) / (size.height * other.width) - 1) <= tolerance


def same_framing(target: Size, reference: Size) -> bool:
    """Whether the aspect ratios differ by at most 1 %, so that both pictures are taken to show the same scene."""
    return similar_shape(reference, target, 0.01)
