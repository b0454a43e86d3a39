"""From a pair's pictures to the pictures that the networks see: one crop rectangle, one resize from the original.

`plan_pair` decides rectangles and sizes from headers alone; `render` makes the pixels. So the cache can be asked
before a picture is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from ..config import ConditioningType, EncodingConfig
from ..geometry import Box, Size, area_size, aspect_area_size, crop_box, scale_box
from ..qwen_image.flavours import Flavour
from ..qwen_image.text_encoder import Picture
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

    @staticmethod
    def from_json(values: Sequence[Any]) -> View:
        """What `as_json` says."""
        box, size, resample = values
        return View(Box(*box), Size(*size), resample)


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Views of a pair's pictures: the target, each reference for the VAE, each reference for Qwen2.5-VL."""

    target: View
    references: tuple[View, ...]
    vision: tuple[View, ...]

    def mask_box(self, target: Size, mask: Size) -> Box:
        """The target's rectangle in a mask, for pictures of these sizes."""
        return scale_box(self.target.box, target, mask)


def plan_pair(
    sizes: Sequence[Size],
    flavour: Flavour,
    encoding: EncodingConfig,
    key: str = "",
    *,
    conditioning_types: Sequence[ConditioningType] = (),
) -> PairPlan:
    """Views for a pair whose pictures have these sizes, the target's first. `key` decides a random crop.

    `conditioning_types` are the references', all auto where there are none.
    """
    bucket = target_size(sizes[0], encoding)
    box = target_box(sizes[0], bucket, encoding, key)
    target = View(box, bucket, "lanczos")
    kinds = conditioning_types or ("auto",) * (len(sizes) - 1)
    seen = [
        _reference(size, kind, Framing(sizes[0], target, key), flavour, encoding)
        for size, kind in zip(sizes[1:], kinds, strict=True)
    ]
    return PairPlan(
        target=target,
        references=tuple(reference for reference, _ in seen),
        vision=tuple(vision for _, vision in seen),
    )


class Framing(NamedTuple):
    """What is seen of a target of size `size`, and the pair's key."""

    size: Size
    view: View
    key: str


def _reference(
    size: Size, kind: ConditioningType, target: Framing, flavour: Flavour, encoding: EncodingConfig
) -> tuple[View, View]:
    """Views of a reference of this size.

    reference_strict is cut by the target's rectangle, and so is auto where both show the same scene. reference_loose is
    seen whole, and so is any other auto; but under match_target_res as much of it as has the target's shape.
    """
    bucket = target.view.size
    if kind == "reference_strict" or (kind == "auto" and same_framing(target.size, size)):
        box = scale_box(target.view.box, target.size, size)
    elif kind == "auto" and encoding.match_target_res:
        box = crop_box(size, bucket, crop_place(encoding, target.key))
    else:
        box = Box(0, 0, *size)
    return plan_reference(box, flavour, encoding, bucket, keep_aspect=kind == "reference_loose")


def same_framing(target: Size, reference: Size) -> bool:
    """Whether the aspect ratios are so near that both show the same scene."""
    return abs((reference.width * target.height) / (reference.height * target.width) - 1) <= SAME_FRAMING


def plan_reference(
    box: Box, flavour: Flavour, encoding: EncodingConfig, target: Size, *, keep_aspect: bool = False
) -> tuple[View, View]:
    """Views of one reference for the VAE and for Qwen2.5-VL, in the sizes of the preprocessing policy.

    Under match_target_res it takes the target's size, or with `keep_aspect` no more than the target's area.
    """
    area = target.width * target.height if encoding.match_target_res and keep_aspect else flavour.reference_area
    if encoding.preprocessing == "comfyui":
        reference = area_size(box.size, area, flavour.comfyui_reference_step)
        vision, resample = area_size(box.size, flavour.vision_area), "area"
    else:
        reference = aspect_area_size(box.size, area)
        vision, resample = aspect_area_size(box.size, flavour.vision_area), "lanczos"
    if encoding.match_target_res and not keep_aspect:
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


def vision_picture(picture: Image.Image, view: View) -> Picture:
    """What the text encoder takes: pixels under the comfyui policy, an 8-bit picture under diffusers'."""
    return render(picture, view) if view.resample == "area" else render_picture(picture, view)


def to_tensor(picture: Image.Image) -> Tensor:
    """[3, H, W] in 0..1 of an RGB picture."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0).permute(2, 0, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """An 8-bit RGB picture of [3, H, W] in 0..1."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(), "RGB")
