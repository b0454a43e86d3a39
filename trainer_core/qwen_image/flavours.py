"""The edit models as a table. Code must use a row's fields and never compare flavour names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..config import FlavourName

MEGAPIXEL = 1024 * 1024
VISION_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"

_SYSTEM = (
    "Describe the key features of the input image (color, shape, size, texture, objects, background), then explain "
    "how the user's text instruction should alter or modify the image. Generate a new image that meets the user's "
    "requirements while maintaining consistency with the original input where appropriate."
)
_SYSTEM_WITHOUT_PICTURE = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:"
)


def chat(system: str, user: str) -> str:
    """A conversation in Qwen2.5-VL's template, up to where its answer begins."""
    return f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Flavour:
    """How one release of the model expects its conditioning.

    Areas are in pixels: Qwen2.5-VL sees a reference at `vision_area`, the VAE encodes it at `reference_area`.
    """

    name: FlavourName
    release: str  # what people call it
    released_as: str
    comfyui_file: str  # the transformer in ComfyUI's template
    pipeline: str  # diffusers' class in the download's model_index.json
    max_references: int
    template: str  # {} stands for the pictures' markers and the caption
    template_without_reference: str
    picture_marker: str  # per reference, {} stands for its number; empty if the template contains the marker
    vision_area: int
    reference_area: int
    comfyui_reference_step: int  # ComfyUI's node rounds a reference's sides to multiples of this
    zero_cond_t: bool  # references are modulated at timestep zero
    comfyui_shift: float  # of ModelSamplingAuraFlow in ComfyUI's template

    @property
    def title(self) -> str:
        """The release with the flavour, for messages: 2509 (edit-v2)."""
        return f"{self.release} ({self.name})"


FLAVOURS: dict[FlavourName, Flavour] = {
    row.name: row
    for row in (
        Flavour(
            name="edit-v1",
            release="Qwen-Image-Edit",
            released_as="Qwen/Qwen-Image-Edit",
            comfyui_file="qwen_image_edit_fp8_e4m3fn.safetensors",
            pipeline="QwenImageEditPipeline",
            max_references=1,
            template=chat(_SYSTEM, VISION_PICTURE + "{}"),
            template_without_reference=chat(_SYSTEM_WITHOUT_PICTURE, "{}"),
            picture_marker="",
            vision_area=MEGAPIXEL,
            reference_area=MEGAPIXEL,
            comfyui_reference_step=1,
            zero_cond_t=False,
            comfyui_shift=3.0,
        ),
        Flavour(
            name="edit-v2",
            release="2509",
            released_as="Qwen/Qwen-Image-Edit-2509",
            comfyui_file="qwen_image_edit_2509_fp8_e4m3fn.safetensors",
            pipeline="QwenImageEditPlusPipeline",
            max_references=3,
            template=chat(_SYSTEM, "{}"),
            template_without_reference=chat(_SYSTEM, "{}"),
            picture_marker="Picture {}: " + VISION_PICTURE,
            vision_area=384 * 384,
            reference_area=MEGAPIXEL,
            comfyui_reference_step=8,
            zero_cond_t=False,
            comfyui_shift=3.0,
        ),
        Flavour(
            name="edit-v3",
            release="2511",
            released_as="Qwen/Qwen-Image-Edit-2511",
            comfyui_file="qwen_image_edit_2511_bf16.safetensors",
            pipeline="QwenImageEditPlusPipeline",
            max_references=3,
            template=chat(_SYSTEM, "{}"),
            template_without_reference=chat(_SYSTEM, "{}"),
            picture_marker="Picture {}: " + VISION_PICTURE,
            vision_area=384 * 384,
            reference_area=MEGAPIXEL,
            comfyui_reference_step=8,
            zero_cond_t=True,
            comfyui_shift=3.1,
        ),
    )
}


def titles(rows: Iterable[Flavour]) -> str:
    """The titles of some rows, for messages: 2509 (edit-v2) or 2511 (edit-v3)."""
    return " or ".join(row.title for row in rows)


def title_of(name: str) -> str:
    """The title of the flavour with this name. A name that no flavour has stays as it is."""
    return next((row.title for row in FLAVOURS.values() if row.name == name), name)


def flavour_of_release(release: str) -> FlavourName | None:
    """The flavour of a release by the name that people use; None if no release is called so."""
    for row in FLAVOURS.values():
        if row.release == release:
            return row.name
    return None
