"""Inside ComfyUI: what a training of the short path is made of, on computers with other cards.

Input: path of the repository, and the sizes of cards in GiB. Output: presets and settings.
"""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import torch

OWN = {"run_name": "edit", "max_train_steps": 0, "seed": 0, "if_run_exists": "continue"}


def main(_tensors: dict[str, torch.Tensor], values: dict[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    parent = types.ModuleType("qwen_edit_pack")
    parent.__path__ = [values["repo"]]
    sys.modules["qwen_edit_pack"] = parent
    composed = importlib.import_module("qwen_edit_pack.nodes.composed")
    sockets = importlib.import_module("qwen_edit_pack.nodes.sockets")
    config = importlib.import_module("qwen_edit_pack.trainer_core.config")
    errors = importlib.import_module("qwen_edit_pack.trainer_core.errors")
    device = importlib.import_module("qwen_edit_pack.trainer_core.device")
    model = sockets.AutomaticModel(base="/no/such", device="cuda")

    def described(model: Any, preset: str = "automatic", **given: Any) -> dict[str, Any]:
        found = composed.compose(errors.Problems(), model, preset=preset, **{**OWN, **given})
        return {
            "preset": found.preset,
            "why": found.why,
            "precision": [found.model.base_model_precision, found.model.mixed_precision],
            "steps": found.config.max_train_steps,
            "rank": found.config.lora.lora_rank,
            "resolution": found.encoding.resolution,
            "warmup": found.config.optimizer.lr_warmup_steps,
            "encodes_difference": found.encoding.encode_pixel_difference,
            "run": Path(found.config.run_dir).name,
            "held": found.from_preset,
            "overridden": list(map(str, found.overridden)),
        }

    cards: dict[str, Any] = {}
    for gib in values["cards"]:
        with mock.patch.object(device, "card_gib", return_value=gib):
            cards[str(gib)] = described(model)
    with mock.patch.object(device, "card_gib", return_value=23.6):
        loop = {"batching": config.BatchingConfig(), "checkpoints": config.CheckpointConfig()}
        noise = config.NoiseConfig(edit_weight=0.3, edit_weight_from="pixels")
        pixels = sockets.LoopSettings(noise=noise, gradient_checkpointing=True, **loop)
        more = sockets.MoreSettingsGiven(lora_settings=config.LoraConfig(lora_rank=4), resolution=512)
        others = {
            "overridden": described(model, more_settings=more, max_train_steps=10),
            "planned for 8": described(
                model, more_settings=sockets.MoreSettingsGiven(memory_settings=config.MemoryConfig(vram_gib=7.6))
            ),
            "quality": described(model, "quality", max_train_steps=50),
            "chosen precision": described(config.ModelConfig(base="/no/such", base_model_precision="none")),
            "demo": described(config.ModelConfig(mixed_precision="no")),
            "pixels": described(model, more_settings=sockets.MoreSettingsGiven(training_settings=pixels)),
        }
    schemas = [node.define_schema().display_name for node in _nodes()]
    return {}, {"cards": cards, "others": others, "names": schemas, "by": composed.SETTINGS_NODES}


def _nodes() -> list[Any]:
    return importlib.import_module("qwen_edit_pack.nodes.settings").NODES
