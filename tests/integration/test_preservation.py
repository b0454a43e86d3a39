"""Turns that preserve: trained towards the base model's prediction, with other instructions or regularisation data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.narrow import make_pairs, small_encoding
from tests.support.runs import PauseAt, Steps, equal, lora_tensors, named, twelve_steps
from trainer_core.adapters.inject import without_lora
from trainer_core.conditioning.batches import BatchPlan
from trainer_core.conditioning.encode import encode_dataset, plan_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.conditioning.mix import MixPart, mix_encoded
from trainer_core.config import (
    USUAL_PROMPTS,
    BatchingConfig,
    EncodingConfig,
    JobConfig,
    ModelConfig,
    PreservationConfig,
    TrainConfig,
    completed_key,
    resume_key,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import ConfigError
from trainer_core.planning.duration import Speed, duration
from trainer_core.planning.preparation import prepare_training
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import train_lora
from trainer_core.training import pair_losses as losses_module

PROMPTS = ("make it night", "keep it as it is", "draw it in ink")


@pytest.fixture(scope="module")
def keeping(model: ModelConfig, tmp_path_factory: pytest.TempPathFactory) -> EncodedDataset:
    """Pairs with preservation prompts."""
    folder = tmp_path_factory.mktemp("keeping")
    dataset = pair_folders(make_pairs(folder / "pairs", 6))
    encoding = dataclasses.replace(small_encoding(), preservation_prompts=PROMPTS)
    return encode_dataset(dataset, BaseModel(model), encoding, folder / "cache")


def config_of(encoded: EncodedDataset, model: ModelConfig, run_dir: Path, **preservation: Any) -> TrainConfig:
    config = twelve_steps(encoded, model, run_dir)
    return dataclasses.replace(config, preservation=PreservationConfig(**preservation))


def test_which_turns_preserve(keeping: EncodedDataset) -> None:
    """They follow from the seed; the others stay as they are without preservation."""
    batching = BatchingConfig(train_batch_size=4)
    plain, kept, again = (
        [draw for number in range(100) for draw in BatchPlan(keeping, batching, 7, preservation)[number]]
        for preservation in (PreservationConfig(), *[PreservationConfig(preservation_probability=0.3)] * 2)
    )
    assert kept == again
    assert 90 < sum(draw.preserves for draw in kept) < 150  # of 400
    assert {draw.caption for draw in kept if draw.preserves} == {0, 1, 2}
    assert [draw.pair for draw in kept] == [draw.pair for draw in plain]
    assert all(one == other for one, other in zip(plain, kept, strict=True) if not other.preserves)


def test_what_such_a_turn_sees(keeping: EncodedDataset) -> None:
    """The reference takes the place of the target, as if nothing were edited; the prompt is its own."""
    entry = keeping.pairs[0]
    edit, kept = keeping.load(entry), keeping.load(entry, 1, preserves=True)
    assert torch.equal(kept.target_latents, edit.reference_latents[0])
    assert torch.equal(kept.reference_latents[0], edit.reference_latents[0])
    assert torch.equal(kept.prompt_embeds, keeping.load_prompt(entry, entry.preservation[1]))
    assert not torch.equal(kept.target_latents, edit.target_latents)
    larger = dataclasses.replace(entry, reference_shapes=((16, 20, 20),))
    assert torch.equal(keeping.load(larger, 1, preserves=True).target_latents, edit.target_latents)


def test_the_target_is_the_base_models_prediction(
    keeping: EncodedDataset, model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after steps have changed the adapter, and with dropout. The loss is weighted; the report shows it plain."""
    config = config_of(keeping, model, tmp_path / "run", preservation_probability=0.5, preservation_weight=3.0)
    predicted, checked = losses_module.predict_velocities, []
    original: Callable[..., Any] = losses_module.pair_losses

    def compared(networks: Any, batch: Any, *others: Any) -> Any:
        wanted: list[Tensor] = []

        def predict(transformer: Any, latents: Any, sigma: Tensor, conditions: Any, *through: Any) -> list[Tensor]:
            if not torch.is_grad_enabled():
                assert not transformer.training
                found = predicted(transformer, latents, sigma, conditions)
                with without_lora(transformer):
                    wanted.extend(predicted(transformer, latents, sigma, conditions))
                assert all(torch.equal(base, each) for base, each in zip(wanted, found, strict=True))
                return found
            return predicted(transformer, latents, sigma, conditions, *through)

        with monkeypatch.context() as patch:
            patch.setattr(losses_module, "predict_velocities", predict)
            found = original(networks, batch, *others)
        kept = torch.tensor([draw.preserves for draw in batch.draws])
        assert len(wanted) == kept.sum()
        assert torch.equal(found.weighted[kept], 3 * found.losses[kept])
        assert torch.equal(found.weighted[~kept], found.losses[~kept])
        checked.append((kept, found.losses.detach()))
        return found

    monkeypatch.setattr("trainer_core.training.step.pair_losses", compared)
    steps = Steps()
    train_lora(config, steps)
    every, losses = (torch.cat(each).view(12, -1) for each in zip(*checked, strict=True))
    assert every.any() and not every.all()
    for report, kept, loss in zip(steps.reports, every, losses, strict=True):
        edits = loss[~kept] if (~kept).any() else loss
        assert report.loss == pytest.approx(float(edits.mean()), rel=1e-6)
        assert report.preservation_loss == (pytest.approx(float(loss[kept].mean()), rel=1e-6) if kept.any() else None)
        assert (report.extra_forwards or 0) == kept.sum()
    first = next(loss[kept] for kept, loss in zip(every, losses, strict=True) if kept.any())
    assert float(first.max()) < 0.2 * float(losses[~every].mean())  # a fresh adapter predicts what the base does


def test_a_run_continues_alike(keeping: EncodedDataset, model: ModelConfig, tmp_path: Path) -> None:
    config = config_of(keeping, model, tmp_path / "run", preservation_probability=0.4)
    unbroken = train_lora(named(config, "unbroken"))
    train_lora(config, PauseAt(5))
    assert equal(lora_tensors(train_lora(config)), lora_tensors(unbroken))
    without = train_lora(named(config, "without", preservation=PreservationConfig()))
    assert not equal(lora_tensors(without), lora_tensors(unbroken))


def test_settings_of_older_runs_stay_the_same(keeping: EncodedDataset, model: ModelConfig, tmp_path: Path) -> None:
    config = twelve_steps(keeping, model, tmp_path / "run")
    old = resume_key(config)
    del old["preservation"]
    assert completed_key(old) == resume_key(config)


def test_prompts_that_are_missing_are_reported_early(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    config = config_of(encoded, model, tmp_path / "run", preservation_probability=0.4)
    with pytest.raises(ConfigError, match=r"preservation_probability is 0\.4, but .* without preservation_prompts"):
        prepare_training(config)


def test_regularisation_data_is_trained_towards_the_base(
    keeping: EncodedDataset, encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    """Its own pictures and captions, without a probability; the pairs of other data sets are edits."""
    dataset = pair_folders(make_pairs(tmp_path / "more", 3))
    other = encode_dataset(dataset, BaseModel(model), small_encoding(), keeping.cache_dir)
    mix = mix_encoded([MixPart(encoded=keeping), MixPart(encoded=other, is_regularisation=True)], keeping.cache_dir)
    plan = BatchPlan(mix, BatchingConfig(train_batch_size=2), 3)
    draws = [draw for number in range(40) for draw in plan[number]]
    assert {draw.preserves for draw in draws} == {True, False}
    assert all(draw.preserves == mix.pairs[draw.pair].is_regularisation for draw in draws)
    steps = Steps()
    train_lora(twelve_steps(mix, model, tmp_path / "run"), steps)
    assert any(report.preservation_loss is not None for report in steps.reports)
    work = prepare_training(twelve_steps(mix, model, tmp_path / "other")).work
    shares = sum(entry.is_regularisation for entry in mix.pairs) / len(mix.pairs)
    assert work.regularised == pytest.approx(shares)


def test_the_forward_passes_are_in_the_estimate(keeping: EncodedDataset, model: ModelConfig, tmp_path: Path) -> None:
    speed = Speed(product=1e-9, attention=1e-9, attention_backward=1e-9)
    estimates = []
    for probability in (0.0, 0.5):
        prepared = prepare_training(config_of(keeping, model, tmp_path / "run", preservation_probability=probability))
        estimates.append(duration(prepared.config, prepared.model.size, prepared.work, speed).step)
    without, half = estimates
    assert 1.1 < half / without < 1.25  # half a forward pass beside one, its second pass and a backward pass


def test_references_of_which_a_turn_shows_one(model: ModelConfig, tmp_path: Path) -> None:
    """Each has the prompts of its own."""
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 4, num_references=2))
    encoding = dataclasses.replace(
        small_encoding(), preservation_prompts=PROMPTS, conditioning_multidataset_sampling="random"
    )
    encoded = encode_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")
    entry = encoded.pairs[0]
    assert [len(each) for each in entry.preservation_by_reference] == [3, 3]
    assert entry.seen(1).preservation == entry.preservation_by_reference[1] != entry.preservation_by_reference[0]
    steps = Steps()
    train_lora(config_of(encoded, model, tmp_path / "run", preservation_probability=0.5), steps)
    assert any(report.preservation_loss for report in steps.reports)


def test_only_the_prompts_are_encoded_again(model: ModelConfig, tmp_path: Path) -> None:
    """Trained pairs have them, held-out pairs don't. A data set without them keeps its name."""
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 5))
    plain = encode_dataset(dataset, BaseModel(model), small_encoding(), tmp_path / "cache")
    encoding = dataclasses.replace(small_encoding(), preservation_prompts=PROMPTS)
    planned = plan_dataset(dataset, BaseModel(model), encoding, tmp_path / "cache")
    assert not planned.missing.latents
    assert sum(len(texts) for _, texts in planned.missing.prompts) == 3 * len(plain.pairs)
    assert all(not entry.preservation for entry in planned.encoded().validation_pairs)
    assert "preservation" not in plain.manifest.read_text()


def test_a_job_encodes_the_usual_prompts() -> None:
    def encoding(**changes: Any) -> EncodingConfig:
        from trainer_core.config import from_json

        job = {"run_dir": "r", "cache_dir": "c", "model": {}, "dataset": {"target_dir": "t", "reference_dirs": ["s"]}}
        return from_json(JobConfig, {**job, **changes}).parts()[0].encoding

    keeps = {"preservation": {"preservation_probability": 0.2}}
    assert encoding().preservation_prompts == ()
    assert encoding(**keeps).preservation_prompts == USUAL_PROMPTS
    assert encoding(**keeps, encoding={"preservation_prompts": ["make it red"]}).preservation_prompts == (
        "make it red",
    )
