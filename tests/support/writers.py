"""Base models whose text encoder can write: a small Qwen2.5-VL with a language head of its own and random weights."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from tests.support.narrow import fill
from trainer_core.config import ModelConfig
from trainer_core.qwen_image.folder import DEMO_FOLDER


def small_writer(seed: int = 7) -> Qwen2_5_VLForConditionalGeneration:
    """The demo's architecture, but with a language head that is not tied to the token embeddings; float32.

    Its answers differ between questions and pictures.
    """
    settings = json.loads((DEMO_FOLDER / "text_encoder" / "config.json").read_text())
    settings["tie_word_embeddings"] = settings["text_config"]["tie_word_embeddings"] = False
    torch.manual_seed(seed)  # for what `fill` leaves
    network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)).eval()
    fill(network, seed)
    return network


def make_writing_base(folder: Path, base: ModelConfig, *, shouts: bool = False) -> ModelConfig:
    """A copy of a narrow base model whose text encoder is `small_writer`.

    With `shouts` it answers every question with exclamation marks, which end a sentence: all its logits are 0, and the
    first token is "!".
    """
    shutil.copytree(base.base, folder)
    shutil.rmtree(folder / "text_encoder")
    network = small_writer()
    if shouts:
        torch.nn.init.zeros_(network.model.language_model.norm.weight)
    network.save_pretrained(folder / "text_encoder")
    return dataclasses.replace(base, base=str(folder))
