"""Crop and resize a pair's pictures for the networks, with one resize from the original.

`plan_pair` decides crops and sizes from the picture sizes alone, so that the cache can be checked before any picture
is decoded. `render` makes the pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..config import ConditioningType, EncodingConfig
from ..data.area import resize_area
from ..geometry import Box, Size, area_size, aspect_area_size, crop_box, differ_by_rounding, same_framing, scale_box
from ..qwen_image.flavours import Flavour
from ..qwen_image.text_encoder import Picture
from .sizes import crop_position, target_box, target_size


@dataclass(frozen=True, slots=True)
class View:
    """A crop of a picture, the size to resize it to, and the resampling filter."""

    box: Box
    size: Size
    resample: Literal["lanczos", "area"]

    def as_json(self) -> list[object]:
        """The view as JSON values, for cache keys."""
        return [list(self.box), list(self.size), self.resample]

    @staticmethod
    def from_json(values: Sequence[Any]) -> View:
        """The view that `as_json` wrote."""
        box, size, resample = values
        return View(Box(*box), Size(*size), resample)


Framing = Literal["alike", "cropped", "whole"]
"""How a reference is framed: cropped like its target, cropped only to the target's aspect ratio, or not at all."""


@dataclass(frozen=True, slots=True)
class PairPlan:
    """Views of a pair's pictures: the target, each reference for the VAE, each reference for Qwen2.5-VL.

    `framings`: one per reference.
    """

    target: View
    references: tuple[View, ...]
    vision: tuple[View, ...]
    framings: tuple[Framing, ...]

    def mask_box(self, target: Size, mask: Size) -> Box:
        """The target's crop in the coordinates of its mask, for pictures of these sizes."""
        return scale_box(self.target.box, target, mask)


def plan_pair(
    sizes: Sequence[Size],
    flavour: Flavour,
    encoding: EncodingConfig,
    key: str = "",
    *,
    conditioning_types: Sequence[ConditioningType] = (),
) -> PairPlan:
    """The views of a pair. `sizes` lists the target first; `key` seeds a random crop.

    `conditioning_types` has one entry per reference; empty means that all are auto.
    """
    bucket = target_size(sizes[0], encoding)
    box = target_box(sizes[0], bucket, encoding, key)
    target = View(box, bucket, "lanczos")
    kinds = conditioning_types or ("auto",) * (len(sizes) - 1)
    framings: list[Framing] = [
        _framing(sizes[0], size, kind, encoding) for size, kind in zip(sizes[1:], kinds, strict=True)
    ]
    boxes: dict[Framing, Callable[[Size], Box]] = {
        "alike": lambda size: scale_box(box, sizes[0], size),
        "cropped": lambda size: crop_box(size, bucket, crop_position(encoding, key)),
        "whole": lambda size: Box(0, 0, *size),
    }
    seen = [
        plan_reference(boxes[framing](size), flavour, encoding, bucket, framing)
        for size, framing in zip(sizes[1:], framings, strict=True)
    ]
    return PairPlan(
        target=target,
        references=tuple(reference for reference, _ in seen),
        vision=tuple(vision for _, vision in seen),
        framings=tuple(framings),
    )


def _framing(target: Size, reference: Size, kind: ConditioningType, encoding: EncodingConfig) -> Framing:
    """How a reference of this size is framed, see `conditioning_type` in docs/reference.md."""
    if kind == "reference_strict" or (kind == "auto" and same_framing(target, reference)):
        return "alike"
    return "cropped" if kind == "auto" and encoding.match_target_res else "whole"


def plan_reference(
    box: Box, flavour: Flavour, encoding: EncodingConfig, target: Size, framing: Framing = "whole"
) -> tuple[View, View]:
    """Views of one reference for the VAE and for Qwen2.5-VL, in the sizes of the preprocessing.

    With match_target_res the VAE's view has the target's size, or about its area if the reference is used whole. It
    also has the target's size if it is framed alike and the sizes differ by rounding only, so that both have the same
    scale. Qwen2.5-VL gets the size that the user's graph or pipeline gives it, whatever the target's size.
    """
    whole = framing == "whole"
    area = target.width * target.height if encoding.match_target_res and whole else flavour.reference_area
    if encoding.preprocessing == "comfyui":
        reference = area_size(box.size, area, flavour.comfyui_reference_step)
        vision, resample = area_size(box.size, flavour.vision_area), "area"
    else:
        reference = aspect_area_size(box.size, area)
        vision, resample = aspect_area_size(box.size, flavour.vision_area), "lanczos"
    matched = encoding.match_target_res and not whole
    if matched or (framing == "alike" and differ_by_rounding(reference, target)):
        reference = target
    return View(box, reference, resample), View(box, vision, resample)  # type: ignore[arg-type]


def render(picture: Image.Image, view: View) -> Tensor:
    """The pixels of an RGB picture's view, [3, H, W] in 0..1.

    `area` averages float pixels, like ComfyUI. `lanczos` uses Pillow, like diffusers.
    """
    if view.resample == "lanczos":
        return to_tensor(render_picture(picture, view))
    return resize_area(picture, view.box, view.size)


def render_picture(picture: Image.Image, view: View) -> Image.Image:
    """The view as an 8-bit RGB picture, resized with Pillow's Lanczos filter."""
    return picture.resize(view.size, Image.Resampling.LANCZOS, box=view.box)


def vision_picture(picture: Image.Image, view: View) -> Picture:
    """The input of the text encoder: pixels for comfyui preprocessing, an 8-bit picture for diffusers."""
    return render(picture, view) if view.resample == "area" else render_picture(picture, view)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture as [3, H, W] in 0..1."""
    return torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255.0).permute(2, 0, 1).contiguous()


def to_picture(pixels: Tensor) -> Image.Image:
    """Pixels [3, H, W] in 0..1 as an 8-bit RGB picture."""
    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy(), "RGB")
