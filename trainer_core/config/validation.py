"""Settings of sample pictures and loss on held-out pairs."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..geometry import Size
from ..settings import If, Limits, Settings, setting

ValidationSchedule = Literal["diffusers", "comfyui"]
StrengthSweep = Literal["auto", "none", "pictures"]

_SIZE = re.compile(r"(\d+)(?:[xX](\d+))?")
_STEPS_IN_NAME = re.compile(r"(?<!\d)(\d{1,2})[-_ ]?steps?(?![a-z])", re.IGNORECASE)
_FEW_PASSES = 16  # of a picture that may be drawn with six strengths without being asked
_FEW_STEPS = 4  # of a few-step LoRA whose name doesn't tell
_OTHERWISE = If("validation_lora", ("",))
_FEW = If("validation_lora", differs=("",))
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


class Drawing(NamedTuple):
    """How validation pictures are sampled. `shift` is that of the schedule `comfyui`; 0: as in ComfyUI's template."""

    steps: int
    guidance: float
    schedule: ValidationSchedule
    shift: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig(Settings):
    """Sample pictures and loss of validation pairs during training. They do not change the training."""

    validation_step_interval: int = setting(
        250, "Steps between validations. 0 validates only at the end.", Limits(min=0, soft_max=1_000_000)
    )
    validation_num_inference_steps: int = setting(
        30, "Number of sampling steps of a validation picture.", Limits(min=1, soft_max=1000), used_if=(_OTHERWISE,)
    )
    validation_guidance: float = setting(
        4.0,
        "True classifier-free guidance scale. 3.5 to 4.5 suits Qwen-Image-Edit; 1 turns guidance off.",
        Limits(min=1, soft_max=30, step=0.1),
        used_if=(_OTHERWISE,),
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
        "that keep_best means. Older ones are deleted. 0 keeps only that of the best step, or none without keep_best.",
        Limits(min=0, soft_max=1000),
    )

    keep_best: bool = setting(
        True,
        "Keep the checkpoint of the best validated step, and save its LoRA as ...-best.safetensors if it isn't the "
        "last step. Best: the highest PSNR of the pictures, among nearly equal ones the least drift; without PSNR the "
        "lowest validation loss.",
    )
    strength_sweep: StrengthSweep = setting(
        "auto",
        "Compare strengths of the finished LoRA from 0.6 to 1.2 by pictures of the held-out pairs, and write the best "
        "one into its header. It takes as long as six validations. auto: if a picture takes at most 16 forward passes, "
        "as with a few-step LoRA. pictures: always. none: never.",
    )
    validation_schedule: ValidationSchedule = setting(
        "diffusers",
        "Noise levels and guidance of the pictures. diffusers: as in its Qwen edit pipelines. comfyui: as in ComfyUI's "
        "edit templates, with sampler euler, scheduler simple, ModelSamplingAuraFlow and CFGNorm. A picture then "
        "equals the one that such a graph draws from the same noise.",
        used_if=(_OTHERWISE,),
    )
    validation_shift: float = setting(
        0.0,
        "Shift of ModelSamplingAuraFlow, for the schedule comfyui. 0: that of ComfyUI's template, 3 for edit-v1 and "
        "edit-v2 and 3.1 for edit-v3.",
        Limits(min=0, usual="0 or 1 to 5", soft_max=20, step=0.1),
    )
    validation_lora: str = setting(
        "",
        "Few-step LoRA: a LoRA file with which pictures need only 4 or 8 steps, such as a Lightning LoRA for this "
        "release of the model. They are drawn without guidance and with ComfyUI's schedule. The LoRA is not trained, "
        "not part of the training, and not saved.",
    )
    validation_lora_strength: float = setting(
        1.0, "Strength of the few-step LoRA.", Limits(soft_min=-2, soft_max=2, step=0.05), used_if=(_FEW,)
    )
    validation_lora_steps: int = setting(
        0,
        "Sampling steps with the few-step LoRA. 0: the number in the file's name, such as 8 in ...-8steps-..., or 4.",
        Limits(min=0, soft_max=50),
        used_if=(_FEW,),
    )

    @staticmethod
    def prepare_json(values: dict[str, Any]) -> dict[str, Any]:
        """Accepts a number as validation_resolution."""
        size = values.get("validation_resolution")
        is_side = type(size) is int and 0 < size < 10**6  # str() raises for numbers of more than 4,300 digits
        return {**values, "validation_resolution": str(size)} if is_side else values

    @property
    def drawing(self) -> Drawing:
        """How pictures are sampled: with the few-step LoRA if there is one."""
        if not self.validation_lora:
            steps, guidance = self.validation_num_inference_steps, self.validation_guidance
            return Drawing(steps, guidance, self.validation_schedule, self.validation_shift)
        named = _STEPS_IN_NAME.search(Path(self.validation_lora).stem)
        in_name = int(named[1]) if named else 0
        return Drawing(self.validation_lora_steps or in_name or _FEW_STEPS, 1.0, "comfyui", self.validation_shift)

    @property
    def compares_strengths(self) -> bool:
        """Whether strengths are compared at the end, if there are pictures."""
        passes = self.drawing.steps * (2 if self.drawing.guidance > 1 else 1)
        return self.strength_sweep == "pictures" or (self.strength_sweep == "auto" and passes <= _FEW_PASSES)

    @property
    def sizes(self) -> tuple[Size | int, ...]:
        """The sizes in pixels. A number is the side of a square of equal area. Empty: use the encoded pair's size."""
        found = [_SIZE.fullmatch(size) for size in _parts(self.validation_resolution)]
        parts = [match.groups() for match in found if match]
        return tuple(Size(int(width), int(height)) if height else int(width) for width, height in parts)
