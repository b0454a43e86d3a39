"""Caption dropout: the empty caption keeps its pair's references, and its draw depends only on seed and turn."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tests.support.narrow import make_pairs, read_rows, small_encoding
from trainer_core.conditioning.batches import BatchPlan
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.entry import EMPTY_CAPTION
from trainer_core.config import (
    BatchingConfig,
    EncodingConfig,
    JobConfig,
    ModelConfig,
    TrainConfig,
    ValidationConfig,
    resume_key,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora


@pytest.fixture(scope="module")
def encoded(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    """Three pairs, also encoded with the empty caption."""
    root = tmp_path_factory.mktemp("dropout")
    dataset = pair_folders(make_pairs(root / "pairs", 3))
    encoding = small_encoding(num_eval_images=0, encode_empty_caption=True)
    return encode_dataset(dataset, BaseModel(model), encoding, root / "cache")


def config(encoded: EncodedDataset, model: ModelConfig, folder: Path, share: float) -> TrainConfig:
    return TrainConfig(
        run_dir=str(folder / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=2,
        batching=BatchingConfig(caption_dropout_probability=share, gradient_accumulation_steps=2),
        validation=ValidationConfig(num_validation_images=0),
    )


def test_the_empty_caption_sees_its_own_references(encoded: EncodedDataset) -> None:
    one, other = (encoded.load(entry, EMPTY_CAPTION).prompt_embeds for entry in encoded.pairs[:2])
    assert len(one) < len(encoded.load(encoded.pairs[0]).prompt_embeds)
    assert one.shape == other.shape and not torch.allclose(one, other, atol=1e-2)
    assert load_encoded(encoded.manifest) == encoded


def test_without_it_names_of_datasets_stay(encoded: EncodedDataset) -> None:
    assert '"empty"' in encoded.manifest.read_text()
    plain = [dataclasses.replace(entry, empty="") for entry in encoded.pairs]
    assert {entry.key for entry in plain} == {entry.key for entry in encoded.pairs}


def test_the_share_is_drawn_reproducibly_and_leaves_the_other_draws(encoded: EncodedDataset) -> None:
    plans = [BatchPlan(encoded, BatchingConfig(caption_dropout_probability=share), 5) for share in (0.0, 0.3, 0.3)]
    turns = [[plan[number][0] for number in range(300)] for plan in plans]
    dropped = [draw.caption == EMPTY_CAPTION for draw in turns[1]]
    assert 60 <= sum(dropped) <= 120 and turns[1] == turns[2]
    assert [draw.pair for draw in turns[0]] == [draw.pair for draw in turns[1]]
    kept = [(a, b) for a, b, lost in zip(turns[0], turns[1], dropped, strict=True) if not lost]
    assert all(a == b for a, b in kept) and all(draw.caption >= 0 for draw in turns[0])


def test_a_run_with_dropout_trains(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> None:
    result = train_lora(config(encoded, model, tmp_path, 0.5))
    assert result.lora_file is not None and len(read_rows(result.run_dir / "metrics.jsonl")) == 2


def test_without_the_empty_caption_both_settings_are_named(
    model: ModelConfig, tmp_path: Path, encoded: EncodedDataset
) -> None:
    plain = dataclasses.replace(encoded, pairs=tuple(dataclasses.replace(each, empty="") for each in encoded.pairs))
    with pytest.raises(ConfigError, match=r"caption_dropout_probability is 0\.1.*encode_empty_caption"):
        BatchPlan(plain, BatchingConfig(caption_dropout_probability=0.1), 0)


def test_the_command_line_needs_one_setting_only_and_it_is_part_of_the_run() -> None:
    from trainer_core.config import DatasetConfig

    job = JobConfig(
        model=ModelConfig(),
        dataset=DatasetConfig(target_dir="a", reference_dirs=("b",)),
        cache_dir="c",
        run_dir="d",
        batching=BatchingConfig(caption_dropout_probability=0.1),
    )
    assert job.encoding == EncodingConfig() and job.parts()[0].encoding.encode_empty_caption
    plain = dataclasses.replace(job, batching=BatchingConfig())
    assert resume_key(job.train_config("x.json")) != resume_key(plain.train_config("x.json"))
    with pytest.raises(ConfigError, match="caption_dropout_probability"):
        BatchingConfig(caption_dropout_probability=1.0)
