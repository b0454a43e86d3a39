"""Answers of the text encoder on a card: its token embeddings are in host memory, and its layers may be."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from tests.support.narrow import picture
from tests.support.writers import make_writing_base
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import ModelConfig
from trainer_core.qwen_image import text_encoder, writer
from trainer_core.qwen_image.base_model import BaseModel

CARD = torch.device("cuda")
PICTURES = [to_tensor(picture(seed, (140, 112))) for seed in (1, 2)]


@pytest.mark.parametrize("free", [2**40, 0], ids=["resident", "streamed"])
def test_the_same_tokens_as_transformers(
    free: int, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_writing_base(tmp_path / "base", dataclasses.replace(model, device="cuda"))
    monkeypatch.setattr(text_encoder, "free_bytes", lambda _: free)
    ours = writer.load_writer(BaseModel(base), CARD)
    assert ours.network.get_input_embeddings().weight.device.type == "cpu"
    inputs = ours.inputs("What was changed?", PICTURES)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(Path(base.base) / "text_encoder").eval().to(CARD)
    wanted = theirs.generate(**inputs, do_sample=False, max_new_tokens=24)[0, inputs["input_ids"].shape[1] :]
    assert ours.token_ids("What was changed?", PICTURES, 24) == wanted.tolist()
