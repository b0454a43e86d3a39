"""The EMA: its formula, no effect on training, a bit-exact resume, and its export."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.support.narrow import read_rows
from tests.support.runs import PauseAt
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    EmaConfig,
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
)
from trainer_core.errors import ConfigError, RunFolderError
from trainer_core.run import TrainResult, find_result, train_lora
from trainer_core.training.ema import average_in_place, decay_at, ema_bytes, restore_ema, start_ema, update_ema

ON = EmaConfig(use_ema=True, ema_decay=0.5)


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Six steps with dropout, every checkpoint kept, and validations after step 4 and at the end."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=6,
        lora=LoraConfig(lora_rank=4, lora_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        batching=BatchingConfig(gradient_accumulation_steps=1),
        checkpoints=CheckpointConfig(checkpoint_step_interval=1, checkpoints_total_limit=10),
        validation=ValidationConfig(
            validation_step_interval=4, validation_num_inference_steps=1, num_validation_images=1
        ),
        ema=ON,
    )


def named(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent / name), **changes)


def equal(one: Path | None, other: Path | None) -> bool:
    assert one is not None and other is not None
    left, right = load_file(one), load_file(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_the_average_is_the_recursion_with_its_warm_up() -> None:
    settings = EmaConfig(use_ema=True, ema_decay=0.3, ema_update_interval=2)
    assert [decay_at(step, settings) for step in (2, 4, 6, 400)] == pytest.approx([2 / 11, 0.3, 0.3, 0.3])
    weight = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    average, expected = start_ema({"a": weight}, settings), 0.0
    for step in range(1, 9):
        weight.data.fill_(step)
        update_ema(average, {"a": weight}, step, settings)
        if step % 2 == 0:
            expected = decay_at(step, settings) * expected + (1 - decay_at(step, settings)) * step
        assert average["a"].dtype == torch.float32
        assert average["a"].tolist() == pytest.approx([expected] * 3, rel=1e-6)


@pytest.mark.parametrize("interval", [1, 10])
def test_the_warm_up_counts_steps_as_simpletuner_does(interval: int) -> None:
    """SimpleTuner's get_decay(s) is (1 + n) / (10 + n) with n = s - 1, and 0 for n = 0."""
    settings = EmaConfig(use_ema=True, ema_decay=0.9999, ema_update_interval=interval)
    kept = [decay_at(step, settings) for step in (1, 2, 10, 100, 1000)]
    assert kept == pytest.approx([0, 2 / 11, 10 / 19, 100 / 109, 1000 / 1009], rel=1e-12)
    assert kept[3] == pytest.approx(0.917, abs=5e-4)


def test_changes_too_small_for_bfloat16_add_up() -> None:
    settings = EmaConfig(use_ema=True, ema_decay=0.999)
    weight = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
    average = start_ema({"a": weight}, settings)
    weight.data.fill_(1.0078125)  # the next larger bfloat16 number
    for step in range(20_000, 20_010):
        update_ema(average, {"a": weight}, step, settings)
    assert float(average["a"]) == pytest.approx(1 + 0.0078125 * (1 - 0.999**10), rel=1e-6)


def test_the_trained_weights_come_back_bit_for_bit() -> None:
    weight = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1)))
    before, average = weight.detach().clone(), {"a": torch.full((5,), 3.0)}
    seen = []

    def interrupted() -> None:
        with average_in_place({"a": weight}, average):
            seen.extend(weight.tolist())
            raise KeyError

    with pytest.raises(KeyError):
        interrupted()
    assert seen == [3.0] * 5
    assert torch.equal(weight, before)


def test_its_bytes_lie_where_it_is_kept() -> None:
    shapes = [(16, 3072), (3072, 16)]
    assert ema_bytes(shapes, EmaConfig(use_ema=True)) == (4 * 2 * 16 * 3072, 0)
    assert ema_bytes(shapes, EmaConfig(use_ema=True, ema_device="accelerator")) == (0, 4 * 2 * 16 * 3072)
    assert ema_bytes(shapes, EmaConfig()) == (0, 0)


def test_a_run_gives_both_and_the_average_is_that_of_its_steps(config: TrainConfig) -> None:
    result = train_lora(config)
    plain = train_lora(named(config, "plain", ema=EmaConfig()))
    assert equal(result.lora_file, plain.lora_file) and plain.ema_file is None
    folders = sorted((result.run_dir / "checkpoints").glob("step-*"))
    assert len(folders) == 6 and not list((plain.run_dir / "checkpoints").glob("*/ema.safetensors"))
    average = load_file(folders[0] / "ema.safetensors")
    for step, folder in enumerate(folders[1:], 2):
        trained, keep = load_file(folder / "lora.safetensors"), decay_at(step, ON)
        average = {name: keep * mean + (1 - keep) * trained[name] for name, mean in average.items()}
    kept = load_file(folders[-1] / "ema.safetensors")
    assert all(torch.allclose(kept[name], mean, rtol=1e-5, atol=1e-7) for name, mean in average.items())
    assert result.ema_file is not None and result.ema_file.name == "run-ema.safetensors"
    exported = load_file(result.ema_file)
    name = next(iter(kept))
    written: Tensor = exported[f"diffusion_model.{name}.weight"]
    assert torch.allclose(written, kept[name].to(written.dtype)) and not equal(result.ema_file, result.lora_file)


def test_a_broken_run_has_the_same_average(config: TrainConfig) -> None:
    unbroken, broken = train_lora(config), named(config, "broken")
    for step in (2, 4):
        assert train_lora(broken, PauseAt(step)).lora_file is None
    result = train_lora(broken)
    assert equal(result.lora_file, unbroken.lora_file)
    assert equal(
        result.run_dir / "checkpoints" / "step-000006" / "ema.safetensors",
        unbroken.run_dir / "checkpoints" / "step-000006" / "ema.safetensors",
    )
    rows, expected = (read_rows(each.run_dir / "metrics.jsonl") for each in (result, unbroken))
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]
    assert find_result(broken) == result
    assert result.ema_file is not None
    result.ema_file.unlink()
    assert find_result(broken) is None
    assert train_lora(broken).ema_file == result.ema_file and result.ema_file.is_file()


def validated(result: TrainResult) -> tuple[set[str], set[str]]:
    """The names of the validation losses in the last metrics row, and of the sampled columns."""
    row = read_rows(result.run_dir / "metrics.jsonl")[-1]
    pictures = (result.run_dir / "samples" / "step-000006").glob("0-*.png")
    losses = {name for name in ("validation_loss", "ema_validation_loss") if name in row}
    return losses, {path.stem.removeprefix("0-") for path in pictures} & {"lora", "ema"}


def test_either_or_both_are_validated_and_the_run_is_the_same(config: TrainConfig) -> None:
    both = train_lora(config)
    assert validated(both) == ({"validation_loss", "ema_validation_loss"}, {"lora", "ema"})
    row = read_rows(both.run_dir / "metrics.jsonl")[-1]
    assert row["validation_loss"] != row["ema_validation_loss"]
    samples = both.samples
    assert samples is not None and samples.psnr_ema not in (None, samples.psnr_lora) and "EMA" in samples.as_text()
    only = train_lora(named(config, "only", ema=dataclasses.replace(ON, ema_validation="ema_only")))
    assert validated(only) == ({"ema_validation_loss"}, {"ema"})
    assert read_rows(only.run_dir / "metrics.jsonl")[-1]["ema_validation_loss"] == row["ema_validation_loss"]
    none = train_lora(
        named(config, "none", ema=dataclasses.replace(ON, ema_validation="none", ema_device="accelerator"))
    )
    assert validated(none) == ({"validation_loss"}, {"lora"})
    assert equal(both.ema_file, only.ema_file) and equal(both.ema_file, none.ema_file)
    widths = [Image.open(each.samples.grid_file).width for each in (both, only, none) if each.samples]
    assert widths[0] > widths[1] == widths[2]


def test_what_may_be_changed_on_the_way(config: TrainConfig) -> None:
    assert train_lora(config, PauseAt(2)).lora_file is None
    for other in (EmaConfig(), dataclasses.replace(ON, ema_decay=0.9)):
        with pytest.raises(RunFolderError, match="ema"):
            train_lora(dataclasses.replace(config, ema=other))
    moved = dataclasses.replace(ON, ema_device="accelerator", ema_validation="none")
    assert train_lora(dataclasses.replace(config, ema=moved)).ema_file is not None
    with pytest.raises(RunFolderError, match="EMA is missing or does not match"):
        restore_ema({"a": torch.zeros(1)}, {})


def test_wrong_settings_are_refused(config: TrainConfig) -> None:
    with pytest.raises(ConfigError, match=r"use_ema must be false.*schedulefree"):
        dataclasses.replace(config, optimizer=OptimizerConfig(optimizer="adamw-schedulefree"))
    for wrong in ({"ema_decay": 1.0}, {"ema_update_interval": 0}, {"ema_device": "gpu"}, {"ema_validation": "both"}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            EmaConfig(**wrong)
