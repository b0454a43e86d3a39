"""Several encoded datasets as one: how often each pair is seen, resumed runs, and clear errors."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support.narrow import make_pairs, read_rows, small_encoding
from trainer_core.conditioning.batches import BatchPlan, Draw
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset, load_encoded
from trainer_core.conditioning.mix import MixPart, mix_encoded, plan_mix
from trainer_core.conditioning.report import encoding_report
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    JobConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    TrainConfig,
    ValidationConfig,
    from_json,
)
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.errors import ConfigError, DatasetError
from trainer_core.events import SilentObserver, StepReport, Stop
from trainer_core.planning.preparation import check_datasets
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mix") / "cache"


@pytest.fixture(scope="module")
def pairs(cache: Path) -> EditDataset:
    return pair_folders(make_pairs(cache.parent / "pairs", 4))


@pytest.fixture(scope="module")
def small(model: ModelConfig, pairs: EditDataset, cache: Path) -> EncodedDataset:
    """Three training pairs at 96 pixels and one held out."""
    return encode_dataset(pairs, BaseModel(model), small_encoding(), cache)


@pytest.fixture(scope="module")
def large(model: ModelConfig, pairs: EditDataset, cache: Path) -> EncodedDataset:
    """The same pairs at 128 pixels."""
    return encode_dataset(pairs, BaseModel(model), small_encoding(resolution=128), cache)


@pytest.fixture
def drawn(small: EncodedDataset, large: EncodedDataset) -> EncodedDataset:
    """Large pairs twice per epoch with lower noise levels, small ones with a probability of 0.3 per epoch."""
    parts = [
        MixPart(encoded=small, probability=0.3),
        MixPart(encoded=large, repeats=1, timestep_sampling_offset=-0.5),
    ]
    return mix_encoded(parts, small.cache_dir)


def epochs(plan: BatchPlan, count: int) -> list[list[Draw]]:
    """The turns of each of the first `count` epochs, of a plan with one turn per micro-batch."""
    found, at = [], 0
    for epoch in range(count):
        length = plan.turns_in_epoch(epoch)
        found.append([draw for number in range(at, at + length) for draw in plan[number]])
        at += length
    return found


def test_two_resolutions_in_one_dataset(small: EncodedDataset, large: EncodedDataset) -> None:
    mix = mix_encoded([MixPart(encoded=small), MixPart(encoded=large)], small.cache_dir)
    assert load_encoded(mix.manifest) == mix and not mix.missing()
    assert Counter(entry.shape for entry in mix.pairs) == {(16, 12, 12): 3, (16, 16, 16): 3}
    keys = [entry.key for entry in (*mix.pairs, *mix.validation_pairs)]
    assert len(set(keys)) == 8 and {key.split("/", 1)[1] for key in keys} == {"000", "001", "002", "003"}
    held_out = {entry.key for entry in mix.validation_pairs}
    assert held_out == {f"{part}/{small.validation_pairs[0].key}" for part in (1, 2)}
    assert {"repeats", "probability"}.isdisjoint(json.loads(mix.manifest.read_text())["pairs"][0])
    plan = BatchPlan(mix, BatchingConfig(train_batch_size=2), 3)
    sizes = [len({mix.pairs[draw.pair].shapes for draw in plan[number]}) for number in range(30)]
    assert set(sizes) == {1, 2}, "pairs of different sizes share micro-batches"


def test_repeats_are_extra_turns(small: EncodedDataset, large: EncodedDataset) -> None:
    mix = mix_encoded([MixPart(encoded=small, repeats=2), MixPart(encoded=large)], small.cache_dir)
    plan = BatchPlan(mix, BatchingConfig(), 3)
    first, second = epochs(plan, 2)
    assert plan.turns_in_epoch(0) == plan.turns_in_epoch(7) == 12
    assert Counter(draw.pair for draw in first) == {0: 3, 1: 3, 2: 3, 3: 1, 4: 1, 5: 1}
    assert [draw.index for draw in first + second] == list(range(24))
    assert "about 12 pairs" in encoding_report(mix)
    twice = mix_encoded([MixPart(encoded=mix, repeats=1, probability=0.5)], small.cache_dir)
    assert [pair.repeats for pair in twice.pairs] == [5, 5, 5, 1, 1, 1]
    assert {pair.probability for pair in twice.pairs} == {0.5}


def test_regularisation_pairs_are_marked_and_not_validated(small: EncodedDataset, large: EncodedDataset) -> None:
    parts = [MixPart(encoded=small), MixPart(encoded=large, is_regularisation=True)]
    mix = mix_encoded(parts, small.cache_dir)
    assert [entry.is_regularisation for entry in mix.pairs] == [False] * 3 + [True] * 3
    assert [entry.key for entry in mix.validation_pairs] == [f"1/{small.validation_pairs[0].key}"]
    assert load_encoded(mix.manifest) == mix, "the manifest keeps the marks"
    rows = json.loads(mix.manifest.read_text())["pairs"]
    assert ["is_regularisation" in row for row in rows] == [False] * 3 + [True] * 3
    assert "own prediction: 3." in encoding_report(mix)
    again = plan_mix([MixPart(encoded=mix, repeats=1)], small.cache_dir)
    assert [entry.is_regularisation for entry in again.pairs] == [False] * 3 + [True] * 3


def test_regularisation_data_alone_is_refused(model: ModelConfig, small: EncodedDataset, tmp_path: Path) -> None:
    mix = mix_encoded([MixPart(encoded=small, is_regularisation=True)], small.cache_dir)
    config = TrainConfig(model=model, encoded=str(mix.manifest), run_dir=str(tmp_path))
    with pytest.raises(DatasetError, match="learns nothing new"):
        check_datasets(config, mix, mix)


def test_no_regularisation_data_is_held_out_unless_it_is_only_validated() -> None:
    values = {"model": {"base": "demo", "flavour": "edit-v1"}, "cache_dir": "c", "run_dir": "r"}
    dataset = {"target_dir": "t", "reference_dirs": "s"}
    parts: list[dict] = [{"id": "edits", "dataset": dataset}, {"id": "keep", "dataset": dataset}]
    parts[1] |= {"is_regularisation_data": True, "encoding": {"num_eval_images": 5, "train_eval_images": True}}
    values |= {"datasets": parts}
    edits, kept = (part.encoding for part in from_json(JobConfig, values).parts())
    assert (edits.num_eval_images, kept.num_eval_images, kept.train_eval_images) == (2, 0, False)
    edits, kept = (part.encoding for part in from_json(JobConfig, values | {"eval_dataset_id": ["keep"]}).parts())
    assert (edits.num_eval_images, kept.num_eval_images) == (0, -1)


def test_offsets_are_kept_per_pair_and_shift_what_is_trained(
    small: EncodedDataset, large: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    parts = [MixPart(encoded=small), MixPart(encoded=large, timestep_sampling_offset=9.0)]
    mix = mix_encoded(parts, small.cache_dir)
    assert load_encoded(mix.manifest) == mix and "timestep_sampling_offset 9: 3." in encoding_report(mix)
    rows = json.loads(mix.manifest.read_text())["pairs"]
    assert [row.get("timestep_sampling_offset") for row in rows] == [None] * 3 + [9.0] * 3
    assert [mix.load(entry).timestep_sampling_offset for entry in mix.pairs] == [0.0] * 3 + [9.0] * 3
    (inner, *_), outer = mix.pairs[3:], MixPart(encoded=mix, timestep_sampling_offset=0.5)
    assert plan_mix([outer], small.cache_dir).pairs[3].timestep_sampling_offset == inner.timestep_sampling_offset + 0.5
    config = TrainConfig(model=model, encoded=str(mix.manifest), run_dir=str(tmp_path / "run"), max_train_steps=1)
    batching = BatchingConfig(train_batch_size=6, gradient_accumulation_steps=1)
    train_lora(dataclasses.replace(config, batching=batching, validation=ValidationConfig(num_validation_images=0)))
    (row, *_) = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert "0.8-1.0" in row["loss_by_sigma"] and len(row["loss_by_sigma"]) > 1
    uniform = dataclasses.replace(config, noise=NoiseConfig(sigma_distribution="uniform"))
    with pytest.raises(ConfigError, match=r"timestep_sampling_offset of the pair '2/00.' is 9, but .* is uniform"):
        check_datasets(uniform, mix, mix)


def test_a_plain_mix_has_the_order_of_the_dataset_alone(small: EncodedDataset) -> None:
    mix = mix_encoded([MixPart(encoded=small)], small.cache_dir)
    plans = [BatchPlan(each, BatchingConfig(train_batch_size=2), 3) for each in (small, mix)]
    assert [plans[0][number] for number in range(12)] == [plans[1][number] for number in range(12)]


def test_probability_draws_anew_and_every_number_stands_alone(drawn: EncodedDataset) -> None:
    found = epochs(BatchPlan(drawn, BatchingConfig(), 3), 200)
    assert len({len(epoch) for epoch in found}) > 1
    turns = [draw for epoch in found for draw in epoch]
    assert [draw.index for draw in turns] == list(range(len(turns)))
    visits = Counter(draw.pair for draw in turns)
    assert all(35 < visits[pair] < 85 for pair in range(3)) and all(visits[pair] == 400 for pair in range(3, 6))
    batching = BatchingConfig(train_batch_size=2)
    for number in (0, 57, len(turns) // 2 - 1):
        assert BatchPlan(drawn, batching, 3)[number] == (turns[2 * number], turns[2 * number + 1])
    backwards = BatchPlan(drawn, batching, 3)
    assert [backwards[number][0] for number in range(40, -1, -1)] == turns[80::-2]


def test_epochs_that_draw_nothing_are_passed_over(small: EncodedDataset) -> None:
    plan = BatchPlan(mix_encoded([MixPart(encoded=small, probability=0.1)], small.cache_dir), BatchingConfig(), 3)
    assert any(plan.turns_in_epoch(epoch) == 0 for epoch in range(10))
    assert [plan[number][0].index for number in range(30)] == list(range(30))


def test_a_part_of_probability_zero_only_validates(small: EncodedDataset, large: EncodedDataset) -> None:
    mix = mix_encoded([MixPart(encoded=small, probability=0.0), MixPart(encoded=large)], small.cache_dir)
    assert len(mix.pairs) == 3 and len(mix.validation_pairs) == 2
    with pytest.raises(DatasetError, match="no pair to train on"):
        mix_encoded([MixPart(encoded=small, probability=0.0)], small.cache_dir)


def test_what_cannot_be_mixed(small: EncodedDataset) -> None:
    other = dataclasses.replace(small, flavour="edit-v2")
    with pytest.raises(
        ConfigError, match=r"1 has flavour Qwen-Image-Edit \(edit-v1\), but number 2 has 2509 \(edit-v2\)"
    ):
        mix_encoded([MixPart(encoded=small), MixPart(encoded=other)], small.cache_dir)
    other = dataclasses.replace(small, preprocessing="diffusers")
    with pytest.raises(ConfigError, match="preprocessing comfyui, but number 2 has diffusers"):
        mix_encoded([MixPart(encoded=small), MixPart(encoded=other)], small.cache_dir)
    other = dataclasses.replace(small, prompt_width=3584)
    with pytest.raises(ConfigError, match=r"prompt_width 128, but number 2 has 3584"):
        mix_encoded([MixPart(encoded=small), MixPart(encoded=other)], small.cache_dir)
    with pytest.raises(ConfigError, match=r"is in the cache '.*cache', but the mix uses '.*elsewhere'"):
        mix_encoded([MixPart(encoded=small)], small.cache_dir.parent / "elsewhere")
    with pytest.raises(ConfigError, match="nothing to mix"):
        mix_encoded([], small.cache_dir)
    for wrong in ({"repeats": -1}, {"probability": 1.5}, {"probability": 0.001}, {"timestep_sampling_offset": 11.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            MixPart(encoded=small, **wrong)


class PauseEvery(SilentObserver):
    """Pauses after `steps` steps."""

    def __init__(self, steps: int) -> None:
        self.left = steps

    def on_step(self, report: StepReport) -> None:
        self.left -= 1

    def should_stop(self) -> Stop:
        return Stop.PAUSE if self.left <= 0 else Stop.NO


def test_a_broken_run_of_a_mix_equals_the_unbroken_one(
    drawn: EncodedDataset, model: ModelConfig, pairs: EditDataset, tmp_path: Path
) -> None:
    """With drawn pairs, two sizes, and a separate validation set that is entirely held out."""
    second = encode_dataset(pairs, BaseModel(model), small_encoding(num_eval_images=-1), drawn.cache_dir)
    config = TrainConfig(
        run_dir=str(tmp_path / "whole"),
        encoded=str(drawn.manifest),
        validation_encoded=str(second.manifest),
        model=model,
        max_train_steps=9,
        seed=5,
        lora=LoraConfig(lora_rank=2),
        batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=2),
        checkpoints=CheckpointConfig(checkpoint_step_interval=4),
        validation=ValidationConfig(
            validation_step_interval=0, validation_num_inference_steps=1, num_validation_images=1
        ),
    )
    unbroken = train_lora(config)
    broken = dataclasses.replace(config, run_dir=str(tmp_path / "broken"))
    for _ in range(2):
        assert train_lora(broken, PauseEvery(3)).lora_file is None
    result = train_lora(broken)
    assert unbroken.lora_file is not None and result.lora_file is not None
    one, other = load_file(unbroken.lora_file), load_file(result.lora_file)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    rows = read_rows(Path(config.run_dir) / "metrics.jsonl")
    assert rows[-1]["validation_loss"] > 0 and result.samples is not None


def test_a_validation_set_that_holds_nothing_out_is_refused(
    drawn: EncodedDataset, model: ModelConfig, pairs: EditDataset, tmp_path: Path
) -> None:
    second = encode_dataset(pairs, BaseModel(model), small_encoding(num_eval_images=0), drawn.cache_dir)
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(drawn.manifest),
        validation_encoded=str(second.manifest),
        model=model,
        max_train_steps=1,
    )
    with pytest.raises(DatasetError, match="num_eval_images -1"):
        train_lora(config)
