"""Settings of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..qwen_image.flavours import FlavourName
from ..settings import check, check_choice, setting

DEMO_MODEL = "demo"

BaseModelPrecision = Literal["none", "int8-quanto", "nf4-bnb", "int4-quanto", "int2-quanto", "fp8-quanto", "file"]
QuantizeVia = Literal["accelerator", "cpu"]
MixedPrecision = Literal["bf16", "no"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Which base model, and how it is held while training."""

    base: str = setting(DEMO_MODEL, "Folder of the base model in diffusers' layout, or `demo` for the embedded model.")
    flavour: FlavourName = setting(
        "edit-v1", "edit-v1 is Qwen-Image-Edit (one reference), edit-v2 is 2509, edit-v3 is 2511 (up to three)."
    )
    base_model_precision: BaseModelPrecision = setting(
        "none",
        "Format of the frozen weights: none is that of mixed_precision, int8-quanto and fp8-quanto halve bf16, "
        "nf4-bnb and int4-quanto quarter it, int2-quanto is an eighth and coarse, file keeps the fp8 or int8 of the "
        "file.",
    )
    quantize_via: QuantizeVia = setting(
        "accelerator", "Where weights are brought into base_model_precision: accelerator is faster, cpu spares VRAM."
    )
    mixed_precision: MixedPrecision = setting(
        "bf16", "Arithmetic of the forward pass: bf16 as usual on GPUs, no for float32 throughout."
    )
    transformer_file: str = setting(
        "", "Transformer as ComfyUI keeps it (.safetensors: bf16, fp8, int8; .gguf); empty: that of the base folder."
    )
    text_encoder_file: str = setting(
        "", "Text encoder as ComfyUI keeps it (.safetensors: bf16, fp8); empty: that of the base folder."
    )
    vae_file: str = setting("", "VAE as ComfyUI keeps it (.safetensors); empty: that of the base folder.")
    tokenizer: str = setting("", "Folder of the Qwen2.5 tokenizer; empty: the one in the base folder.")
    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.")

    def __post_init__(self) -> None:
        if str(self.base_model_precision) == "no_change":  # SimpleTuner's word
            object.__setattr__(self, "base_model_precision", "none")
        check_choice(self, "flavour", "base_model_precision", "quantize_via", "mixed_precision")
        check(bool(self.base), "base", self.base, "a folder in diffusers' layout, or `demo`")
