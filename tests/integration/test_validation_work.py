"""The forward passes that a plan expects of a run's validations, against those that the run makes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path

import pytest
import torch

from tests.support.narrow import make_pairs, small_encoding
from trainer_core.conditioning.encode import encode_dataset, plan_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import EmaConfig, LoraConfig, ModelConfig, TrainConfig, ValidationConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.events import SILENT
from trainer_core.planning.workload import Workload, workload_of_encoded, workload_of_pairs
from trainer_core.qwen_image import sampling
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training import validation
from trainer_core.training.validation_work import Passes, ValidationWork, validation_is_due, validation_work

PROMPTS = ("paint it red", "draw it with a pencil on paper")
SETTINGS = ValidationConfig(
    validation_step_interval=2,
    validation_num_inference_steps=2,
    validation_guidance=3.0,
    num_validation_images=1,
    validation_resolution="96,64x128,96x96",  # 96 is 96x96 here
    strength_sweep="none",
)
DATASET = small_encoding(num_eval_images=2, validation_prompts=PROMPTS)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory: pytest.TempPathFactory, model: ModelConfig) -> EncodedDataset:
    folder = tmp_path_factory.mktemp("work")
    return encode_dataset(pair_folders(make_pairs(folder / "pairs", 4)), BaseModel(model), DATASET, folder / "cache")


def config_of(encoded: EncodedDataset, model: ModelConfig, run: Path) -> TrainConfig:
    return TrainConfig(
        run_dir=str(run),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=5,
        lora=LoraConfig(lora_rank=2),
        validation=SETTINGS,
        ema=EmaConfig(use_ema=True),
    )


def planned(work: Workload, config: TrainConfig, done: int = 0) -> ValidationWork:
    return validation_work(
        config.validation,
        config.ema,
        max_train_steps=config.max_train_steps,
        held_out=work.held_out,
        pictures=work.pictures,
        done=done,
    )


def by_picture_tokens(passes: tuple[Passes, ...]) -> Counter[int]:
    counted: Counter[int] = Counter()
    for each in passes:
        counted[each.image] += each.count
    return counted


class Counting:
    """Counts the pairs that pass through the transformer, by picture tokens, outside of the training steps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: Counter[int] = Counter()
        self._forward = sampling.predict_velocity
        for module in (sampling, validation):
            monkeypatch.setattr(module, "predict_velocity", self)

    def __call__(self, transformer: torch.nn.Module, latents: torch.Tensor, sigma: torch.Tensor, condition):
        shapes = [each.shape[-2:] for each in (latents, *condition.reference_latents)]
        self.seen[sum(-(-height // 2) * -(-width // 2) for height, width in shapes)] += len(latents)
        return self._forward(transformer, latents, sigma, condition)


def test_the_planned_passes_are_those_of_a_run(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(encoded, model, tmp_path / "run")
    work = workload_of_encoded(encoded, config.batching, config.validation, encoded)
    counting = Counting(monkeypatch)
    train_lora(config, SILENT)
    expected = planned(work, config)
    assert expected.times == 3  # after steps 2, 4 and 5
    assert counting.seen == by_picture_tokens(expected.total) and len(counting.seen) == 2
    longest = max(len(encoded.load_prompt(pair, pair.validation_prompts[1])) for pair in encoded.validation_pairs)
    assert {each.text for each in work.pictures} == {longest}


def test_before_encoding_only_the_prompts_are_estimated(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    config = config_of(encoded, model, tmp_path / "run")
    pairs = pair_folders(make_pairs(tmp_path / "pairs", 4))
    parts = [plan_dataset(pairs, BaseModel(model), DATASET, tmp_path / "cache")]
    early = workload_of_pairs(parts, config.batching, config.validation)
    work = workload_of_encoded(encoded, config.batching, config.validation, encoded)
    assert by_picture_tokens(planned(early, config).total) == by_picture_tokens(planned(work, config).total)


@pytest.mark.parametrize("interval", [0, 1, 3, 4, 12, 50])
@pytest.mark.parametrize("done", [0, 2, 3, 11, 12])
def test_validations_are_counted_as_they_fall_due(interval: int, done: int) -> None:
    config = dataclasses.replace(SETTINGS, validation_step_interval=interval)
    due = [step for step in range(1, 13) if validation_is_due(config, step, 12)]
    pair = [Passes(8, 2, 1)]
    work = validation_work(config, EmaConfig(), max_train_steps=12, held_out=pair, pictures=pair, done=done)
    assert work.times == len([step for step in due if step > done])
    assert bool(work.first) == (work.times > 0 and not any(step <= done for step in due))


def test_without_held_out_pairs_nothing_is_validated() -> None:
    work = validation_work(SETTINGS, EmaConfig(), max_train_steps=12, held_out=(), pictures=())
    assert (work.times, work.total) == (0, ())


def test_guidance_and_the_average_double_the_passes() -> None:
    pair = [Passes(8, 2, 1)]

    def each(config: ValidationConfig, ema: EmaConfig) -> int:
        work = validation_work(config, ema, max_train_steps=4, held_out=pair, pictures=pair)
        return sum(passes.count for passes in work.each)

    plain = dataclasses.replace(SETTINGS, validation_guidance=1.0)
    assert each(plain, EmaConfig()) == 4 + 2  # noise levels of the loss, sampling steps
    assert each(SETTINGS, EmaConfig()) == 4 + 2 * 2
    assert each(SETTINGS, EmaConfig(use_ema=True)) == 2 * (4 + 2 * 2)
    assert each(SETTINGS, EmaConfig(use_ema=True, ema_validation="ema_only")) == 4 + 2 * 2
