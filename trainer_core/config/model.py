"""Settings of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check, check_at_least, check_choice, setting

DEMO_MODEL = "demo"

FlavourName = Literal["edit-v1", "edit-v2", "edit-v3"]
BaseModelPrecision = Literal["none", "int8-quanto", "nf4-bnb", "int4-quanto", "int2-quanto", "fp8-quanto", "file"]
EIGHT_BITS: tuple[BaseModelPrecision, ...] = ("int8-quanto", "fp8-quanto")
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
    text_encoder_precision: BaseModelPrecision = setting(
        "none", "Format of the text encoder's weights while prompts are encoded, in the words of base_model_precision."
    )
    quantize_activations: bool = setting(
        False,
        "Also round what goes into quantised layers to 8 bits, each token by a scale of its own; for int8-quanto and "
        "fp8-quanto. Coarser, and no faster here: for a LoRA that will be used that way.",
    )
    quantised_cache_gb: float = setting(
        0.0,
        "Largest size in GB of the folder of quantised weights that are kept for the next start, which is then several "
        "times faster; those unused longest go first. 0 keeps none.",
    )
    quantised_cache_dir: str = setting("", "Where they are kept; empty: below cache_dir.")
    device: str = setting("auto", "Where to compute: auto, cpu, cuda, cuda:1, mps.")

    def __post_init__(self) -> None:
        for name in ("base_model_precision", "text_encoder_precision"):
            if str(getattr(self, name)) == "no_change":  # SimpleTuner's word
                object.__setattr__(self, name, "none")
        check_choice(self, "flavour", "base_model_precision", "text_encoder_precision", "quantize_via")
        check_choice(self, "mixed_precision")
        check(bool(self.base), "base", self.base, "a folder in diffusers' layout, or `demo`")
        check_at_least(self, 0, "quantised_cache_gb")
        if self.quantize_activations:
            allowed = " or ".join(EIGHT_BITS) + " with quantize_activations, whose layers multiply 8-bit numbers"
            check(self.base_model_precision in EIGHT_BITS, "base_model_precision", self.base_model_precision, allowed)
