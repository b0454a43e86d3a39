"""Conversion between ComfyUI's IMAGE (float tensor [B, H, W, C] in 0..1) and PIL."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image


def picture_to_image(picture: Image.Image) -> torch.Tensor:
    """A PIL picture as IMAGE [1, H, W, 3]."""
    return torch.from_numpy(np.array(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]


def file_to_image(path: Path) -> torch.Tensor:
    """A picture file as IMAGE [1, H, W, 3]."""
    with Image.open(path) as picture:
        return picture_to_image(picture)


def empty_image() -> torch.Tensor:
    """A black IMAGE [1, 64, 64, 3], for outputs that have nothing to show."""
    return torch.zeros(1, 64, 64, 3)


def image_to_picture(image: torch.Tensor) -> Image.Image:
    """The first picture of an IMAGE as RGB. Transparent parts become white."""
    pixels = (image[0].detach().cpu().float().clamp(0, 1).numpy() * 255.0).round().astype(np.uint8)
    picture = Image.fromarray(pixels if pixels.shape[-1] > 1 else pixels[..., 0])
    if picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")
