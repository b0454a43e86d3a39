"""Answers of the text encoder with its language head equal those of transformers' own `generate` on the same files."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support.narrow import picture
from tests.support.writers import make_writing_base
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import BaseModelPrecision, ModelConfig
from trainer_core.events import SILENT
from trainer_core.qwen_image import text_encoder, writer
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder_file import load_by_layers
from trainer_core.qwen_image.vision_attention import attend_in_batches

CPU = torch.device("cpu")
PICTURES = [to_tensor(picture(seed, size)) for seed, size in ((1, (140, 112)), (2, (140, 112)), (3, (56, 168)))]
QUESTION = "What was changed?"


@pytest.fixture(scope="module")
def base(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return make_writing_base(tmp_path_factory.mktemp("writing") / "base", model)


def theirs(base: ModelConfig, dtype: torch.dtype = torch.float32) -> Any:
    """What transformers itself loads from the folder."""
    folder = Path(base.base) / "text_encoder"
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


def generated(network: Any, inputs: dict[str, torch.Tensor], **settings: Any) -> list[int]:
    found = network.generate(**inputs, do_sample=False, **{"max_new_tokens": 24, **settings})
    return found[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_same_tokens_as_transformers(base: ModelConfig, count: int) -> None:
    ours, plain = writer.load_writer(BaseModel(base), CPU), theirs(base)
    inputs = ours.inputs(QUESTION, PICTURES[:count])
    wanted = generated(plain, inputs)
    assert ours.token_ids(QUESTION, PICTURES[:count], 24) == wanted
    print(wanted)
