"""Narrow models with random weights, and generated pairs: real classes and files, only smaller."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import DatasetConfig, EncodingConfig, LoraConfig, ModelConfig, Preprocessing, TrainConfig
from trainer_core.events import SILENT
from trainer_core.planning.network import NetworkSize, network_size
from trainer_core.planning.preparation import prepare_model
from trainer_core.qwen_image.base_model import BaseModel, empty_transformer
from trainer_core.qwen_image.flavours import FLAVOURS, Flavour
from trainer_core.qwen_image.folder import DEMO_FOLDER
from trainer_core.qwen_image.frozen_forward import optimise_frozen_forward
from trainer_core.qwen_image.sampling import QWEN_SCHEDULE
from trainer_core.rng import stream
from trainer_core.training.step import Networks, build_networks

NARROW = {
    "num_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 128,
    "axes_dims_rope": (4, 6, 6),
}


def fill(network: torch.nn.Module, seed: int, scale: float = 1.0) -> None:
    """Random weights that keep activations in range; they depend only on the seed and the parameter names."""
    for name, parameter in network.named_parameters():
        fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
        drawn = torch.randn(parameter.shape, generator=stream(seed, "narrow", name))
        weight = drawn * scale / fan_in**0.5 if parameter.ndim > 1 else drawn * 0.1 + ("norm" in name)
        parameter.data.copy_(weight)


def make_base(folder: Path, tokenizer: Path, flavour: str = "edit-v1", seed: int = 0) -> ModelConfig:
    """Write a narrow base model in diffusers' layout, with the demo's text encoder configuration."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel

    from trainer_core.demo.text_encoder import build_text_encoder

    transformer = QwenImageTransformer2DModel(**NARROW, zero_cond_t=FLAVOURS[flavour].zero_cond_t)
    fill(transformer, seed)
    transformer.save_pretrained(folder / "transformer")
    vae = AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    fill(vae, seed + 1)
    vae.save_pretrained(folder / "vae")
    build_text_encoder(DEMO_FOLDER / "text_encoder").save_pretrained(folder / "text_encoder")
    FlowMatchEulerDiscreteScheduler.from_config(QWEN_SCHEDULE).save_pretrained(folder / "scheduler")
    shutil.copytree(tokenizer, folder / "tokenizer")
    return ModelConfig(base=str(folder), flavour=flavour, mixed_precision="no", device="cpu")


def picture(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """A smooth random colour picture of size (width, height)."""
    width, height = size
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small, "RGB").resize((width, height), Image.Resampling.BICUBIC)


def make_pairs(
    folder: Path, count: int = 4, sizes: tuple[tuple[int, int], ...] = ((96, 96),), num_references: int = 1
) -> DatasetConfig:
    """Write folders of references, and targets that are the first reference's negatives, with captions."""
    references = tuple(folder / f"reference_{number + 1}" for number in range(num_references))
    for each in (folder / "target", *references):
        each.mkdir(parents=True)
    for index in range(count):
        size = sizes[index % len(sizes)]
        for number, reference in enumerate(references):
            picture(index + 100 * number, size).save(reference / f"{index:03d}.png")
        negative = 255 - np.asarray(picture(index, size))
        Image.fromarray(negative).save(folder / "target" / f"{index:03d}.png")
        (folder / "target" / f"{index:03d}.txt").write_text("turn it into a negative" + " please" * (index % 3))
    return DatasetConfig(target_dir=str(folder / "target"), reference_dirs=tuple(map(str, references)))


def show_less() -> Flavour:
    """Shows Qwen2.5-VL the references of edit-v1 at 96² pixels in place of 1024². Returns the row as it was."""
    row = FLAVOURS["edit-v1"]
    FLAVOURS["edit-v1"] = dataclasses.replace(row, vision_area=96 * 96)
    return row


def small_encoding(**changes: object) -> EncodingConfig:
    """Encoding settings: resolution 96, references in the target's size, one pair held out."""
    return EncodingConfig(**{"resolution": 96, "match_target_res": True, "num_eval_images": 1, **changes})


def read_rows(path: Path) -> list[dict]:
    """The rows of a metrics file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def planned_size(
    settings: dict[str, Any], model: ModelConfig, lora: LoraConfig, *, stored_bytes: float = 0.0
) -> NetworkSize:
    """The planner's size of a transformer with these settings, made without a file."""
    network = empty_transformer(settings)
    optimise_frozen_forward(network)
    return network_size(network, plan_adapter(network, lora), model, stored_bytes)


def networks_of(config: TrainConfig, preprocessing: Preprocessing = "comfyui") -> Networks:
    """Transformer, adapter and optimizer, built as in a training."""
    model = prepare_model(config, BaseModel(config.model))
    return build_networks(config, model.base, model.adapter, preprocessing, SILENT)
