"""Settings of sample pictures and loss on held-out pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..geometry import Size
from ..settings import Limits, Settings, setting

_SIZE = re.compile(r"(\d+)(?:[xX](\d+))?")
SIZE_STEP = 16  # pixels: one token is 2 x 2 latents, one latent 8 x 8 pixels


def _are_sizes(text: str) -> bool:
    return all(map(_is_size, _parts(text)))


def _parts(text: str) -> list[str]:
    return [size.strip() for size in text.split(",")] if text else []


def _is_size(size: str) -> bool:
    match = _SIZE.fullmatch(size)
    if match is None or len(size) > 9:
        return False
    sides = [int(side) for side in match.groups() if side]
    return all(64 <= side <= 4096 for side in sides) and (len(sides) == 1 or not any(s % SIZE_STEP for s in sides))


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig(Settings):
    """Sample pictures and loss of validation pairs during training. They do not change the training."""

    validation_step_interval: int = setting(
        250, "Steps between validations. 0 validates only at the end.", Limits(min=0, soft_max=1_000_000)
    )
    validation_num_inference_steps: int = setting(
        30, "Number of sampling steps of a validation picture.", Limits(min=1, soft_max=1000)
    )
    validation_guidance: float = setting(
        4.0,
        "True classifier-free guidance scale. 3.5 to 4.5 suits Qwen-Image-Edit; 1 turns guidance off.",
        Limits(min=1, soft_max=30, step=0.1),
    )
    validation_seed: int = setting(
        42, "Seed of the sampling noise of validation pictures.", Limits(soft_min=0, soft_max=2**32 - 1)
    )
    num_validation_images: int = setting(
        4,
        "Maximum number of validation pairs to sample. The validation loss always uses all of them.",
        Limits(min=0, soft_max=100),
    )
    validation_resolution: str = setting(
        "",
        "Sizes of validation pictures in pixels, separated by commas. 1024x768 is width and height; 768 has the area "
        "of a 768 x 768 square and the pair's aspect ratio. Empty: the size of the encoded pair. Smaller needs less "
        "VRAM.",
        Limits(
            valid=_are_sizes,
            allowed="comma-separated sizes of 64 to 4096 pixels, such as 1024x768 (multiples of 16) or 768, or empty",
        ),
    )

    validation_loras_total_limit: int = setting(
        4,
        "Number of validated steps whose LoRA is kept beside its pictures. That of the best step is kept too: the one "
        "with the highest PSNR, or without PSNR the lowest validation loss. Older ones are deleted. 0 keeps none.",
        Limits(min=0, soft_max=1000),
    )

    @staticmethod
    def prepare_json(values: dict[str, Any]) -> dict[str, Any]:
        """Accepts a number as validation_resolution."""
        size = values.get("validation_resolution")
        is_side = type(size) is int and 0 < size < 10**6  # str() raises for numbers of more than 4,300 digits
        return {**values, "validation_resolution": str(size)} if is_side else values

    @property
    def sizes(self) -> tuple[Size | int, ...]:
        """The sizes in pixels. A number is the side of a square of equal area. Empty: use the encoded pair's size."""
        found = [_SIZE.fullmatch(size) for size in _parts(self.validation_resolution)]
        parts = [match.groups() for match in found if match]
        return tuple(Size(int(width), int(height)) if height else int(width) for width, height in parts)
