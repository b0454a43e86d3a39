"""Settings for every kind of adapter, random adapter weights, and inputs for a narrow transformer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trainer_core.config import LoraConfig
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

# A different rank for the to_q layers and a different alpha for the second block.
PATTERNS = {"rank_pattern": (r".*attn\.to_q = 6",), "alpha_pattern": ("1 = 3",)}
KINDS = {
    "lora": LoraConfig(lora_rank=4, lora_alpha=10, lora_targets="all", **PATTERNS),
    "rslora": LoraConfig(lora_rank=4, lora_targets="attention-mlp", use_rslora=True, **PATTERNS),
    "dora": LoraConfig(lora_rank=4, lora_alpha=6, lora_targets="all", lora_type="dora", **PATTERNS),
    "lokr": LoraConfig(
        lora_rank=2, lora_alpha=3, lora_targets="all", lora_type="lokr", lokr_factor=4, alpha_pattern=("1 = 5",)
    ),
    "lokr, whole": LoraConfig(
        lora_rank=1024, lora_alpha=700, lora_targets="image-attention", lora_type="lokr", lokr_factor=-1
    ),
}


def randomise(parameters: dict[str, nn.Parameter], scale: float = 0.3) -> None:
    """Fill each parameter with normal draws that depend on its name; DoRA scales only vary by 10 % (std)."""
    for name, weight in parameters.items():
        drawn = torch.randn(weight.shape, generator=stream(1, "adapter cases", name))
        weight.data.copy_(weight.detach() * (1 + 0.1 * drawn) if name.endswith("dora_scale") else drawn * scale)


def inputs() -> tuple[Tensor, Tensor, Condition]:
    """Latents [1, 16, 12, 12], sigma [1] and condition for a narrow model."""
    generator = stream(0, "adapter cases")
    latents, reference = (torch.randn(1, 16, 12, 12, generator=generator) for _ in range(2))
    prompt = torch.randn(1, 9, 128, generator=generator)
    return latents, torch.full((1,), 0.6), Condition((reference,), prompt)
