"""LoRA files with random weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from trainer_core.adapters.inject import for_file, inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.adapters.writer import LoraMetadata, export_lora
from trainer_core.config import LoraConfig, LoraType, ModelConfig, TrainConfig
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.transformer import load_transformer
from trainer_core.rng import stream


def write_lora(path: Path, model: ModelConfig, lora_type: LoraType = "lora") -> Path:
    """An exported adapter with random weights on all kinds of layers."""
    lora = LoraConfig(lora_rank=4, lora_type=lora_type, lora_targets="all")
    transformer = load_transformer(BaseModel(dataclasses.replace(model, frozen_loras=())), torch.device("cpu"))
    weights = inject_lora(transformer, plan_adapter(transformer, lora), seed=0)
    for name, weight in weights.items():
        if not name.endswith("dora_scale"):
            drawn = torch.randn(weight.shape, generator=stream(0, path.name, name))
            weight.data.copy_(drawn * 0.2)
    metadata = LoraMetadata(TrainConfig(run_dir="run", encoded="none", model=model, lora=lora), 1)
    return export_lora(for_file(transformer, weights), path, metadata)
