"""From a pair's pictures to the pictures that the networks see: one crop rectangle, one resize from the original.

`plan_pair` decides rectangles and sizes from headers alone; `render` makes the pixels. So the cache can be asked
before a picture is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..config import EncodingConfig
from ..geometry import Box, Size, area_size, aspect_area_size, crop_box, scale_box
from ..qwen_image.flavours import Flavour
from .sizes import crop_place, target_box, target_size

SAME_FRAMING = 0.01  # references whose aspect ratio is within 1 % of the target's show the same scene


@dataclass(frozen=True, slots=True)
class View:
    """A rectangle of a picture at a size, and the filter that takes it there."""

    box: Box
    size: Size
    resample: Literal["lanczos", "area"]

    def as_json(self) -> list[object]:
        """For cache keys."""
        return [list(self.box), list(self.size), self.resample]


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Views of a pair's pictures: the target, each reference for the VAE, each reference for Qwen2.5-VL."""

    target: View
    references: tuple[View, ...]
    vision: tuple[View, ...]

    def mask_box(self, target: Size, mask: Size) -> Box:
        """The target's rectangle in a mask, for pictures of these sizes."""
        return scale_box(self.target.box, target, mask)


def plan_pair(sizes: Sequence[Size], flavour: Flavour, encoding: EncodingConfig, key: str = "") -> PairPlan:
    """Views for a pair whose pictures have these sizes, the target's first. `key` decides a random crop."""
    bucket = target_size(sizes[0], encoding)
    box = target_box(sizes[0], bucket, encoding, key)
    boxes = [_reference_box(box, (sizes[0], size), bucket, encoding, key) for size in sizes[1:]]
    views = [plan_reference(each, flavour, encoding, bucket) for each in boxes]
    return PairPlan(
        target=View(box, bucket, "lanczos"),
        references=tuple(reference for reference, _ in views),
        vision=tuple(vision for _, vision in views),
    )


def _reference_box(box: Box, sizes: tuple[Size, Size], bucket: Size, encoding: EncodingConfig, key: str) -> Box:
    """The target's rectangle where target and reference (`sizes`) show the same scene; else all of the reference, or
    under match_target_res as much of it as has the target's shape."""
    target, size = sizes
    if same_framing(target, size):
        return scale_box(box, target, size)
    if encoding.match_target_res:
        return crop_box(size, bucket, crop_place(encoding, key))
    return Box(0, 0, *size)


def same_framing(target: Size, reference: Size) -> bool:
    """Whether the aspect ratios are so near that both show the same scene."""
    return abs((reference.width * target.height) / (reference.height * target.width) - 1) <= SAME_FRAMING


def plan_reference(box: Box, flavour: Flavour, encoding: EncodingConfig, target: Size) -> tuple[View, View]:
    """Views of one reference for the VAE and for Qwen2.5-VL, in the sizes of the preprocessing policy."""
    if encoding.preprocessing == "comfyui":
        reference = area_size(box.size, flavour.reference_area, flavour.comfyui_reference_step)
        vision, resample = area_size(box.size, flavour.vision_area), "area"
    else:
        reference = aspect_area_size(box.size, flavour.reference_area)
        vision, resample = aspect_area_size(box.size, flavour.vision_area), "lanczos"
    if encoding.match_target_res:
        reference = target
    if flavour.same_picture:
        vision = reference
    return View(box, reference, resample), View(box, vision, resample)  # type: ignore[arg-type]


def render(picture: Image.Image, view: View) -> Tensor:
    """Pixels [3, H, W] in 0..1 of an RGB picture's view.

    `area` is ComfyUI's: float pixels through torch's area interpolation. `lanczos` is Pillow's, as in diffusers.
    """
    if view.resample == "lanczos":
        return to_tensor(render_picture(picture, view))
    cropped = to_tensor(picture.crop(view.box))
    return interpolate(cropped.unsqueeze(0), size=(view.size.height, view.size.width), mode="area")[0]


def render_picture(picture: Image.Image, view: View) -> Image.Image:
    """The view as an 8-bit RGB picture, through Pillow's Lanczos filter."""
    return picture.resize(view.size, Image.Resampling.LANCZOS, box=view.box)


def to_tensor(picture: Image.Image) -> Tensor:
    """[3, H, W] in 0..1 of an RGB picture."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0).permute(2, 0, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """An 8-bit RGB picture of [3, H, W] in 0..1."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(), "RGB")
