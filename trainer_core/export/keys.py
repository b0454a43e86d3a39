"""Names of adapter tensors in files: `transformer.<module>.` and a name for the part, which ComfyUI reads.

LoRA: `lora_A.weight`, `lora_B.weight`; diffusers reads these too. DoRA: also `dora_scale` [out, 1], which diffusers
leaves out with a warning. LoKr: `lokr_w1`, `lokr_w2` or `lokr_w2_a` and `lokr_w2_b`, which diffusers refuses.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import LoraConfig, LoraType

# What people have to know about a file of each kind.
READERS: dict[LoraType, str] = {
    "lora": "",
    "dora": "A DoRA for ComfyUI: diffusers would leave its dora_scale out and draw something else.",
    "lokr": "A LoKr for ComfyUI: diffusers does not read it.",
}
LORA_TYPE = "qwen_edit_trainer.lora_type"  # in the file's header
PREFIX = "transformer."
_SCALED = ("lora_B", "lokr_w1")


def to_file_tensors(tensors: Mapping[str, Tensor], lora: LoraConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of the file for adapter tensors by their names in training.

    The scale alpha / rank is folded into B, or LoKr's w1, and there is no alpha tensor: readers disagree about what a
    missing or present one means, and all agree about this. `dora_scale` stays in float32, since it multiplies the base
    weight itself.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        value = tensor.detach().float().cpu()
        if part == "dora_scale":
            found[f"{PREFIX}{name}"] = value.unsqueeze(1)
            continue
        if part in _SCALED:
            value = value * _scale(tensors, module, lora)
        found[f"{PREFIX}{name}.weight" if part.startswith("lora_") else f"{PREFIX}{name}"] = value.to(dtype)
    return found


def _scale(tensors: Mapping[str, Tensor], module: str, lora: LoraConfig) -> float:
    down = tensors.get(f"{module}.lora_A")
    return lora.scale_of(module, lora.rank_of(module) if down is None else down.shape[0])
