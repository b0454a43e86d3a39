"""Settings of pictures and loss on held-out pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from ..geometry import Size
from ..settings import check, check_at_least, setting

_SIZE = re.compile(r"(\d+)(?:[xX](\d+))?")
SIZE_STEP = 16  # pixels, so that no token is cut: a latent is 8, a token two latents
_SIZES_ALLOWED = (
    "comma separated sizes of 64 to 4096 pixels, 1024x768 in multiples of 16 or 768 for the pair's own shape, "
    "or nothing"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """Pictures and loss on held-out pairs while training. Changes nothing about the training itself."""

    validation_step_interval: int = setting(250, "Steps between validations; 0 for only at the end.")
    validation_num_inference_steps: int = setting(30, "Sampling steps of a validation picture.")
    validation_guidance: float = setting(4.0, "True classifier-free guidance. Qwen edit likes 3.5 to 4.5; 1 is off.")
    validation_seed: int = setting(42, "Noise of the validation pictures.")
    num_validation_images: int = setting(4, "At most so many held-out pairs are drawn; all give the validation loss.")
    validation_resolution: str = setting(
        "",
        "Sizes of validation pictures, comma separated: 1024x768 is width and height, 768 has the area of that square "
        "in the pair's own shape. Empty: the size of the encoded pair. Smaller takes less memory.",
    )

    @staticmethod
    def prepare_json(values: dict[str, Any]) -> dict[str, Any]:
        """One validation_resolution may be a number."""
        size = values.get("validation_resolution")
        return {**values, "validation_resolution": str(size)} if type(size) is int else values

    def __post_init__(self) -> None:
        check_at_least(self, 0, "validation_step_interval", "num_validation_images")
        check_at_least(self, 1, "validation_num_inference_steps", "validation_guidance")
        wrong = [size for size in self._wanted() if not _is_allowed(size)]
        check(not wrong, "validation_resolution", self.validation_resolution, _SIZES_ALLOWED)

    @property
    def sizes(self) -> tuple[Size | int, ...]:
        """The sizes in pixels; a number is the side of a square of equal area. None: that of the encoded pair."""
        found = [_SIZE.fullmatch(size) for size in self._wanted()]
        parts = [match.groups() for match in found if match]
        return tuple(Size(int(width), int(height)) if height else int(width) for width, height in parts)

    def _wanted(self) -> list[str]:
        return [size.strip() for size in self.validation_resolution.split(",")] if self.validation_resolution else []


def _is_allowed(size: str) -> bool:
    match = _SIZE.fullmatch(size)
    if match is None or len(size) > 9:
        return False
    sides = [int(side) for side in match.groups() if side]
    return all(64 <= side <= 4096 for side in sides) and (len(sides) == 1 or not any(s % SIZE_STEP for s in sides))
