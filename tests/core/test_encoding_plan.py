"""The memory plan of encoding: on small cards the text encoder decides, and the plan says so before loading it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning import encode as encode_module
from trainer_core.conditioning.encode import encode_dataset, plan_dataset
from trainer_core.config import BaseModelPrecision, JobConfig, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError, OutOfMemoryError
from trainer_core.events import SILENT
from trainer_core.job import encode_job, pair_job, plan_job
from trainer_core.memory.streaming import BlockStream
from trainer_core.planning import report as report_module
from trainer_core.planning.choose import Budget
from trainer_core.planning.duration import Speed
from trainer_core.planning.encoding import encoding_in_words
from trainer_core.planning.plan import GIB
from trainer_core.planning.workload import (
    ATTENTION,
    CONVOLUTION,
    LANGUAGE_MODEL,
    NOTHING,
    VISION_TOWER,
    EncodingWork,
    encoding_work,
)
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder import load_text_encoder
from trainer_core.qwen_image.text_encoder_file import qwen25_vl_7b
from trainer_core.qwen_image.text_encoder_size import STREAM_BUFFERS, text_encoder_size
from trainer_core.qwen_image.vae import GAPS, VAE_WEIGHTS, batch_pixels
from trainer_core.qwen_image.vae_tiles import ENCODING_ELEMENTS

MEGAPIXEL = 1024 * 1024


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb"])
def test_weights_are_counted_from_the_header(model: ModelConfig, precision: BaseModelPrecision) -> None:
    model = dataclasses.replace(model, text_encoder_precision=precision)
    network = load_text_encoder(BaseModel(model), "comfyui", torch.device("cpu")).network
    held = {each.data_ptr(): each.nbytes for each in (*network.parameters(), *network.buffers())}
    assert text_encoder_size(BaseModel(model), 4, precision).weights == pytest.approx(sum(held.values()), rel=0.02)


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb"])
def test_streamed_layers_take_what_is_counted(model: ModelConfig, precision: BaseModelPrecision) -> None:
    base = BaseModel(dataclasses.replace(model, text_encoder_precision=precision))
    size = text_encoder_size(base, 4, precision)
    layers = load_text_encoder(base, "comfyui", torch.device("cpu")).network.model.language_model.layers
    stream = BlockStream(list(layers), torch.device("cpu"), STREAM_BUFFERS)
    assert stream.host_bytes == pytest.approx(size.layers * size.layer, rel=0.1)
    assert stream.device_bytes == pytest.approx(
        STREAM_BUFFERS * size.layer, rel=0.1
    )  # tensors are aligned, and these are narrow


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


@pytest.mark.usefixtures("true_areas")
def test_a_small_card_is_told_what_is_streamed(model: ModelConfig, full_size: Path) -> None:
    model = dataclasses.replace(model, text_encoder_file=str(full_size), mixed_precision="bf16")
    size = text_encoder_size(BaseModel(model), 2, "none")
    assert size.weights / GIB == pytest.approx(14.4, abs=0.1) and size.layers == 28
    text, fits = encoding_in_words(BaseModel(model), MEGAPIXEL, Budget(int(23 * GIB), 64 * GIB))
    assert fits and "streamed" not in text
    card = Budget(int(11.4 * GIB), 64 * GIB)
    text, fits = encoding_in_words(BaseModel(model), MEGAPIXEL, card)
    assert fits and "text encoder 14.4, text_encoder_precision none" in text
    assert "10 of its 28 layers are streamed from RAM" in text
    assert "With text_encoder_precision int8-quanto it would fit." in text
    smaller = dataclasses.replace(model, text_encoder_precision="int8-quanto")
    text, fits = encoding_in_words(BaseModel(smaller), MEGAPIXEL, card)
    assert fits and "streamed" not in text
    text, fits = encoding_in_words(BaseModel(model), MEGAPIXEL, Budget(card.device_bytes, 3 * GIB))
    assert not fits and "GiB of RAM, but 3.0 GiB are free" in text
    assert encoding_in_words(BaseModel(model), 64 * MEGAPIXEL, card)[1]  # the VAE works in tiles
    text, fits = encoding_in_words(BaseModel(model), MEGAPIXEL, Budget(2 * GIB, 64 * GIB))
    assert not fits and "Lower resolution" in text


@pytest.mark.parametrize("precision", ["none", "int8-quanto", "nf4-bnb"])
@pytest.mark.parametrize("card", [3.6, 5, 6.6, 11.4, 15.4, 23.4])
def test_the_most_layers_that_fit_stay_on_the_device(
    model: ModelConfig, full_size: Path, precision: BaseModelPrecision, card: float
) -> None:
    """On a card of 8 GB, encoding stays below 7.2 GiB."""
    base = BaseModel(dataclasses.replace(model, text_encoder_file=str(full_size), mixed_precision="bf16"))
    size, free = text_encoder_size(base, 2, precision), int(card * GIB)
    streamed = size.streamed_layers(free)
    assert size.device_bytes(streamed) + GAPS <= free
    assert streamed == 0 or size.device_bytes(streamed - 1) + GAPS > free
    picture = ENCODING_ELEMENTS * 2 * batch_pixels(free - 2 * VAE_WEIGHTS, 2) + 2 * VAE_WEIGHTS
    assert picture + GAPS <= free


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


PICTURE = CONVOLUTION * 96**2 + ATTENTION * 96**4  # operations of the VAE


def test_the_work_is_what_the_cache_lacks(model: ModelConfig, tmp_path: Path) -> None:
    dataset, base, cache = pair_folders(make_pairs(tmp_path / "pairs", 4)), BaseModel(model), tmp_path / "cache"
    encoding = small_encoding(num_eval_images=0)

    def left(**changes: object) -> EncodingWork:
        return encoding_work([plan_dataset(dataset, base, dataclasses.replace(encoding, **changes), cache)])

    whole = left()
    assert (whole.vae, whole.largest_picture) == (pytest.approx(8 * PICTURE), 96 * 96)
    assert left(reference_latents="on_the_fly").vae == pytest.approx(4 * PICTURE)
    half = encode_dataset(dataclasses.replace(dataset, pairs=dataset.pairs[:2]), base, encoding, cache)
    rest = left()
    assert rest.vae == pytest.approx(whole.vae / 2)
    tokens = sum(64 + len(half.load(entry).prompt_embeds) for entry in half.pairs)
    seen = 2 * VISION_TOWER * (96 // 28) ** 2
    assert whole.text_encoder - rest.text_encoder == pytest.approx(seen + LANGUAGE_MODEL * tokens, rel=0.2)
    shutil.rmtree(cache / "prompt")
    assert left().text_encoder == pytest.approx(whole.text_encoder - seen), "visual tokens are still in the cache"
    encode_dataset(dataset, base, encoding, cache)
    assert left() == NOTHING


def test_datasets_that_share_pictures_encode_them_once(model: ModelConfig, tmp_path: Path) -> None:
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 2))
    planned = plan_dataset(dataset, BaseModel(model), small_encoding(num_eval_images=0), tmp_path / "cache")
    assert encoding_work([planned, planned]) == encoding_work([planned])


def test_the_plan_names_the_time_of_encoding(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = Speed(product=1e-14, attention=1e-14, attention_backward=1e-14, vae=60 / (6 * PICTURE), is_estimate=True)
    monkeypatch.setattr(report_module, "probed_speed", lambda *_: speed)
    job = job_of(model, tmp_path)
    before, _ = plan_job(job)
    assert ", encoding 60 s." in before and "Encoding, before training:" in before
    encode_job(job)
    after, fits = plan_job(job)
    assert fits and "steps of" in after and "ncoding" not in after


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
