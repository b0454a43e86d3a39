"""Settings of the base model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..settings import If, Limits, Settings, check, required, setting

DEMO_MODEL = "demo"

FlavourName = Literal["edit-v1", "edit-v2", "edit-v3"]
BaseModelPrecision = Literal["none", "int8-quanto", "nf4-bnb", "int4-quanto", "int2-quanto", "fp8-quanto", "file"]
EIGHT_BITS: tuple[BaseModelPrecision, ...] = ("int8-quanto", "fp8-quanto")
QuantizeVia = Literal["accelerator", "cpu"]
MixedPrecision = Literal["bf16", "no"]
MatmulPrecision = Literal["auto", "bf16", "8bit"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrozenLoraConfig(Settings):
    """A LoRA that is part of the frozen base model."""

    file: str = required(
        "LoRA, DoRA or LoKr file in any format that ComfyUI loads.", Limits(valid=bool, allowed="a file")
    )
    strength: float = setting(1.0, "Strength of the LoRA.", Limits(soft_min=-2, soft_max=2, step=0.05))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig(Settings):
    """The base model, and the precision of its weights."""

    base: str = setting(
        DEMO_MODEL,
        "Folder of the base model in the diffusers layout, or `demo` for the small embedded model.",
        Limits(valid=bool, allowed="a folder in the diffusers layout, or `demo`"),
    )
    flavour: FlavourName = setting(
        "edit-v1",
        "Version of the model. edit-v1: Qwen-Image-Edit (one reference). edit-v2: 2509, edit-v3: 2511 (up to three "
        "references).",
    )
    base_model_precision: BaseModelPrecision = setting(
        "none",
        "Format of the frozen weights. none: not quantised (bf16, or float32 if mixed_precision is no). int8-quanto "
        "and fp8-quanto: half the size of bf16. nf4-bnb and int4-quanto: a quarter. int2-quanto: an eighth, with low "
        "accuracy. file: keep the fp8 or int8 weights of the file.",
    )
    quantize_via: QuantizeVia = setting(
        "accelerator", "Where weights are quantised: accelerator is faster, cpu saves VRAM."
    )
    mixed_precision: MixedPrecision = setting(
        "bf16", "Precision of the computation: bf16 is usual on GPUs, no is float32 throughout."
    )
    transformer_file: str = setting(
        "",
        "Transformer file as used by ComfyUI (.safetensors in bf16, fp8 or int8, or .gguf). Empty: use the base "
        "folder's.",
    )
    text_encoder_file: str = setting(
        "", "Text encoder file as used by ComfyUI (.safetensors in bf16 or fp8). Empty: use the base folder's."
    )
    vae_file: str = setting("", "VAE file as used by ComfyUI (.safetensors). Empty: use the base folder's.")
    tokenizer: str = setting("", "Folder of the Qwen2.5 tokenizer. Empty: use the base folder's.")
    text_encoder_precision: BaseModelPrecision = setting(
        "none", "Format of the text encoder's weights while prompts are encoded. Same values as base_model_precision."
    )
    quantize_activations: bool = setting(
        False,
        "Also quantise the inputs of quantised layers to 8 bits, with one scale per token; for int8-quanto and "
        "fp8-quanto. Less accurate and not faster. Use it for a LoRA that will be run this way.",
        used_if=(If("base_model_precision", EIGHT_BITS),),
        unused=False,
    )
    matmul_precision: MatmulPrecision = setting(
        "auto",
        "How quantised layers multiply in training. bf16: weights are dequantised to the precision of mixed_precision. "
        "8bit: weights, inputs and gradients are 8-bit numbers, which is usually faster and less accurate; needs an "
        "RTX 30 or newer and Triton. auto: 8bit if it is faster on this GPU and hardly changes the gradients; a run "
        "keeps this choice. Previews never use 8bit.",
    )
    quantised_cache_gb: float = setting(
        0.0,
        "Maximum size in GB of the cache of quantised weights, which makes later starts several times faster. The "
        "least recently used weights are deleted first. 0 turns the cache off.",
        Limits(min=0, unit="GB", soft_max=1000, step=1),
    )
    quantised_cache_dir: str = setting("", "Folder of the cache of quantised weights. Empty: a folder in cache_dir.")
    frozen_loras: tuple[FrozenLoraConfig, ...] = setting(
        (),
        "LoRAs that are added to the base model before it is quantised, such as a Lightning LoRA or a style. They are "
        "not trained and not part of the saved LoRA: use it together with them, at the same strengths.",
    )
    device: str = setting("auto", "Device to compute on: auto, cpu, cuda, cuda:1 or mps.")

    # SimpleTuner's name for none
    OLDER: ClassVar = {name: {"no_change": "none"} for name in ("base_model_precision", "text_encoder_precision")}

    def check_combinations(self) -> None:
        """Checks that quantised activations and 8-bit products have quantised layers."""
        in_8_bits, allowed = self.matmul_precision == "8bit", "auto or bf16 if base_model_precision is none"
        check(not in_8_bits or self.base_model_precision != "none", "matmul_precision", "8bit", allowed)
        if self.quantize_activations:
            allowed = " or ".join(EIGHT_BITS) + " if quantize_activations is on"
            check(self.base_model_precision in EIGHT_BITS, "base_model_precision", self.base_model_precision, allowed)
