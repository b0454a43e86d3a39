"""The memory plan of encoding: on small cards the text encoder decides, and the plan says so before loading it."""

from __future__ import annotations

import dataclasses
import json
import struct
from pathlib import Path

import pytest
import torch

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning import encode as encode_module
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import BaseModelPrecision, JobConfig, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError, OutOfMemoryError
from trainer_core.events import SILENT
from trainer_core.job import pair_job, plan_job
from trainer_core.planning.choose import Budget
from trainer_core.planning.encoding import encoding_in_words, text_encoder_bytes
from trainer_core.planning.plan import GIB
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.text_encoder_file import qwen25_vl_7b

MEGAPIXEL = 1024 * 1024


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb"])
def test_weights_are_counted_from_the_header(model: ModelConfig, precision: BaseModelPrecision) -> None:
    model = dataclasses.replace(model, text_encoder_precision=precision)
    network = load_text_encoder(BaseModel(model), "comfyui", torch.device("cpu")).network
    held = {each.data_ptr(): each.nbytes for each in (*network.parameters(), *network.buffers())}
    assert text_encoder_bytes(BaseModel(model), precision, 4) == pytest.approx(sum(held.values()), rel=0.02)


@pytest.fixture(scope="module")
def full_size(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with the header of the full Qwen2.5-VL-7B. Its weights are a sparse hole that takes no disk space."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**qwen25_vl_7b()))
    header, end = {}, 0
    for name, weight in network.named_parameters():
        header[name] = {"dtype": "BF16", "shape": list(weight.shape), "data_offsets": [end, end + 2 * weight.numel()]}
        end += 2 * weight.numel()
    text = json.dumps(header).encode()
    path = tmp_path_factory.mktemp("full size") / "qwen_2.5_vl_7b.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return path


def test_a_small_card_is_told_which_precision_fits(model: ModelConfig, full_size: Path) -> None:
    model = dataclasses.replace(model, text_encoder_file=str(full_size), mixed_precision="bf16")
    assert text_encoder_bytes(BaseModel(model), "none", 2) / GIB == pytest.approx(14.4, abs=0.1)
    card = Budget(int(11.4 * GIB), 64 * GIB)
    text, fits = encoding_in_words(BaseModel(model), MEGAPIXEL, card)
    assert not fits
    assert "text encoder 14.4, text_encoder_precision none" in text
    assert "Set text_encoder_precision to int8-quanto" in text
    smaller = dataclasses.replace(model, text_encoder_precision="int8-quanto")
    assert encoding_in_words(BaseModel(smaller), MEGAPIXEL, card)[1]
    assert "Encode on a larger device" in encoding_in_words(BaseModel(model), MEGAPIXEL, Budget(4 * GIB, 64 * GIB))[0]
    assert "Lower resolution" in encoding_in_words(BaseModel(model), 64 * MEGAPIXEL, card)[0]


def job_of(model: ModelConfig, tmp_path: Path, **changes: object) -> JobConfig:
    folders = make_pairs(tmp_path / "pairs", 3)
    return JobConfig(
        dataset=folders,
        cache_dir=str(tmp_path / "cache"),
        run_dir=str(tmp_path / "run"),
        model=model,
        encoding=small_encoding(num_eval_images=0, **changes),
    )


def test_the_plan_speaks_of_encoding(model: ModelConfig, tmp_path: Path) -> None:
    text, _ = plan_job(job_of(model, tmp_path), vram_gib=24)
    assert "Encoding, before training:" in text


def test_memory_that_ran_out_while_encoding_is_explained(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(encode_module, "encode_prompts", full)
    with pytest.raises(OutOfMemoryError, match=r"encoding prompts.*stay in the cache.*text_encoder_precision"):
        encode_dataset(
            pair_folders(make_pairs(tmp_path / "pairs", 2)), BaseModel(model), small_encoding(), tmp_path / "cache"
        )


def test_more_references_than_the_flavour_takes_are_refused_before_encoding(model: ModelConfig, tmp_path: Path) -> None:
    folders = make_pairs(tmp_path / "pairs", 2, num_references=2)
    job = dataclasses.replace(job_of(model, tmp_path / "job"), dataset=folders)
    with pytest.raises(ConfigError, match="2 references per pair"):
        pair_job(job)
    one_at_a_time = dataclasses.replace(job.encoding, conditioning_multidataset_sampling="random")
    text, _ = plan_job(dataclasses.replace(job, encoding=one_at_a_time), 24, SILENT)
    assert ", 1 reference:" in text
