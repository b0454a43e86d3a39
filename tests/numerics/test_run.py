"""The training run: equal to itself after any stop, whatever the batches, and never spoilt."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.narrow import make_pairs, read_rows, small_encoding
from trainer_core import run as run_module
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    EmaConfig,
    ExportConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    ValidationConfig,
    to_json,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DatasetError, NonFiniteLossError, OutOfMemoryError, RunFolderError
from trainer_core.events import SILENT, SilentObserver, StepReport, Stop
from trainer_core.run import TrainResult, find_result, train_lora
from trainer_core.training import optimizer as optimizer_module
from trainer_core.training import step as step_module
from trainer_core.training import validation as validation_module


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    """Twelve steps with everything going on: checkpoints, validation, accumulation, dropout, a schedule."""
    return TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=12,
        seed=5,
        lora=LoraConfig(lora_rank=4, lora_alpha=6, lora_targets="attention", lora_dropout=0.1),
        optimizer=OptimizerConfig(learning_rate=3e-3, lr_scheduler="cosine", lr_warmup_steps=2),
        batching=BatchingConfig(train_batch_size=2, gradient_accumulation_steps=2),
        checkpoints=CheckpointConfig(checkpoint_step_interval=3, checkpoints_total_limit=2),
        validation=ValidationConfig(
            validation_step_interval=5, validation_num_inference_steps=2, num_validation_images=1
        ),
    )


def named(config: TrainConfig, name: str, **changes: Any) -> TrainConfig:
    """The same settings in a run folder of another name."""
    return dataclasses.replace(config, run_dir=str(Path(config.run_dir).parent / name), **changes)


def lora_tensors(result: TrainResult) -> dict[str, torch.Tensor]:
    assert result.lora_file is not None
    return load_file(result.lora_file)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class StopAfter(SilentObserver):
    """Wants to stop at the n-th time of asking after this process's first step."""

    def __init__(self, asked: int, stop: Stop = Stop.PAUSE) -> None:
        self.left, self.stop, self.training = asked, stop, False

    def on_step(self, report: StepReport) -> None:
        self.training = True

    def should_stop(self) -> Stop:
        self.left -= self.training
        return self.stop if self.left < 0 else Stop.NO


class Steps(SilentObserver):
    """Remembers the reports."""

    def __init__(self) -> None:
        self.reports: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)


def test_stopped_at_every_moment_and_continued_equals_the_unbroken_run(config: TrainConfig) -> None:
    unbroken = train_lora(config)
    moments = range(0, 25, 4)
    broken = named(config, "broken")
    pauses = []
    for asked in [*moments, 10**9]:
        result = train_lora(broken, StopAfter(asked))
        pauses.append(result.steps_done)
        if result.lora_file:
            break
        assert result.stopped is Stop.PAUSE
    assert len(set(pauses)) >= 2, f"never stopped on the way: {pauses}"
    assert equal(lora_tensors(result), lora_tensors(unbroken))
    without_time = [{**row, "seconds": 0} for row in read_rows(Path(broken.run_dir) / "metrics.jsonl")]
    assert without_time == [{**row, "seconds": 0} for row in read_rows(Path(config.run_dir) / "metrics.jsonl")]


def test_killed_at_random_moments_and_continued_equals_the_unbroken_run(config: TrainConfig, tmp_path: Path) -> None:
    """SIGKILL three times, at moments that a generator seeded by the clock picks."""
    longer = dataclasses.replace(config, max_train_steps=40, optimizer=OptimizerConfig(learning_rate=3e-3))
    unbroken, killed = train_lora(longer), named(longer, "killed")
    (tmp_path / "config.json").write_text(json.dumps(to_json(killed)))
    metrics = Path(killed.run_dir) / "metrics.jsonl"
    moments = random.Random(time.time_ns())
    for _ in range(3):
        command = [sys.executable, "-m", "tests.support.train_until_killed", str(tmp_path / "config.json")]
        steps_before = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
        with subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.DEVNULL) as process:
            deadline = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < deadline:
                if metrics.exists() and len(metrics.read_bytes().splitlines()) != steps_before:
                    time.sleep(moments.uniform(0, 0.7))
                    break
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
    assert 0 < len(read_rows(metrics)) < 40, "the kills came too late to show anything"
    result = train_lora(killed)
    assert unbroken.lora_file is not None and result.lora_file is not None
    assert equal(lora_tensors(result), lora_tensors(unbroken))
    assert [row["step"] for row in read_rows(metrics)] == list(range(1, 41))


def test_same_seed_same_run_whatever_the_process_drew(config: TrainConfig) -> None:
    first = train_lora(config)
    torch.rand(17)
    before = torch.get_rng_state()
    assert equal(lora_tensors(train_lora(named(config, "again"))), lora_tensors(first))
    assert torch.equal(torch.get_rng_state(), before)
    assert not equal(lora_tensors(train_lora(named(config, "other", seed=6))), lora_tensors(first))


def test_validation_changes_nothing_that_follows(config: TrainConfig) -> None:
    never = ValidationConfig(validation_step_interval=0, num_validation_images=0)
    with_pictures, without = train_lora(config), train_lora(named(config, "without", validation=never))
    assert equal(lora_tensors(with_pictures), lora_tensors(without))
    assert without.samples is None and with_pictures.samples is not None
    assert with_pictures.samples.grid_file.is_file()
    often = dataclasses.replace(
        config.validation, validation_step_interval=2, validation_resolution="64x128,96", num_validation_images=2
    )
    assert equal(lora_tensors(train_lora(named(config, "often", validation=often))), lora_tensors(without))


def test_memory_settings_change_nothing(config: TrainConfig) -> None:
    plain = train_lora(named(config, "plain", gradient_checkpointing=False))
    assert equal(lora_tensors(plain), lora_tensors(train_lora(config)))


def test_one_batch_of_four_equals_four_of_one(model: ModelConfig, tmp_path: Path) -> None:
    """Prompts are of unequal length here, so this also shows that padding is masked away."""
    dataset = pair_folders(make_pairs(tmp_path / "pairs", 4))
    encoded = encode_dataset(dataset, model, small_encoding(num_eval_images=0), tmp_path / "cache")
    assert len({encoded.load(entry).prompt_embeds.shape for entry in encoded.pairs}) > 1
    reports = {}
    for size in (1, 4):
        observer = Steps()
        train_lora(
            TrainConfig(
                run_dir=str(tmp_path / f"by {size}"),
                encoded=str(encoded.manifest),
                model=model,
                max_train_steps=4,
                lora=LoraConfig(lora_rank=4, lora_targets="all"),
                optimizer=OptimizerConfig(learning_rate=1e-3),
                batching=BatchingConfig(train_batch_size=size, gradient_accumulation_steps=4 // size),
            ),
            observer,
        )
        reports[size] = [(report.loss, report.grad_norm) for report in observer.reports]
    torch.testing.assert_close(torch.tensor(reports[1]), torch.tensor(reports[4]), rtol=2e-4, atol=1e-5)


def test_stop_and_keep_exports_and_is_answered_from_its_folder(config: TrainConfig) -> None:
    kept = train_lora(config, StopAfter(8, Stop.KEEP))
    assert kept.stopped is Stop.KEEP and kept.lora_file and 0 < kept.steps_done < 12
    assert find_result(config) == kept == train_lora(config)
    unbroken = train_lora(named(config, "unbroken"))
    assert equal(lora_tensors(train_lora(config, continue_kept=True)), lora_tensors(unbroken))


def test_a_kept_run_writes_its_file_again_and_trains_no_further(config: TrainConfig) -> None:
    kept = train_lora(config, StopAfter(8, Stop.KEEP))
    weights, steps = lora_tensors(kept), Steps()
    renamed = dataclasses.replace(config, export=ExportConfig(trigger_words="sks"))
    assert find_result(renamed) is None
    again = train_lora(renamed, steps)
    assert (again.stopped, again.steps_done, steps.reports) == (Stop.KEEP, kept.steps_done, [])
    assert equal(lora_tensors(again), weights) and again.lora_file is not None
    with safe_open(again.lora_file, "pt") as file:
        assert "sks" in json.dumps(file.metadata())
    again.lora_file.rename(again.lora_file.with_name("moved.safetensors"))
    assert train_lora(renamed, steps) == again == find_result(renamed)
    assert steps.reports == [] and equal(lora_tensors(again), weights)


def test_a_kept_run_without_its_checkpoint_is_not_written_again(config: TrainConfig) -> None:
    kept = train_lora(config, StopAfter(8, Stop.KEEP))
    before = lora_tensors(kept)
    shutil.rmtree(Path(config.run_dir) / "checkpoints" / f"step-{kept.steps_done:06d}")
    assert find_result(config) == kept
    with pytest.raises(RunFolderError, match=rf"at step {kept.steps_done} and kept.*continue a kept run"):
        train_lora(dataclasses.replace(config, export=ExportConfig(trigger_words="sks")))
    assert equal(lora_tensors(kept), before)


def test_a_kept_run_that_went_on_is_no_longer_kept(config: TrainConfig) -> None:
    kept = train_lora(config, StopAfter(4, Stop.KEEP))
    paused = train_lora(config, StopAfter(4), continue_kept=True)
    assert paused.stopped is Stop.PAUSE and paused.steps_done > kept.steps_done
    assert find_result(config) is None
    assert train_lora(config).steps_done == 12


def test_a_finished_run_is_answered_at_once_and_goes_on_when_more_steps_are_wanted(config: TrainConfig) -> None:
    constant = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3))
    first = train_lora(dataclasses.replace(constant, max_train_steps=6))
    began = time.perf_counter()
    assert train_lora(dataclasses.replace(constant, max_train_steps=6)) == first
    assert time.perf_counter() - began < 1
    longer = train_lora(constant)
    assert longer.steps_done == 12
    assert equal(lora_tensors(longer), lora_tensors(train_lora(named(constant, "unbroken"))))


def test_a_run_folder_refuses_other_settings(config: TrainConfig) -> None:
    train_lora(dataclasses.replace(config), StopAfter(8))
    before = {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}
    other = dataclasses.replace(config, lora=LoraConfig(lora_rank=8), noise=NoiseConfig(flow_schedule_shift=3.0))
    with pytest.raises(RunFolderError) as caught:
        train_lora(other)
    assert "lora.lora_rank 4 -> 8" in str(caught.value)
    assert "noise.flow_schedule_shift 1.73 -> 3.0" in str(caught.value)
    assert before == {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_left_alone(config: TrainConfig) -> None:
    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / "holiday.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not a run"):
        train_lora(config)
    assert [path.name for path in folder.iterdir()] == ["holiday.txt"]


def test_a_loss_that_is_not_finite_stops_before_the_weights_are_spoilt(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    healthy = train_lora(named(config, "healthy"))
    steps = iter(range(100))

    class Poisoned(torch.optim.AdamW):
        def zero_grad(self, set_to_none: bool = True) -> None:
            super().zero_grad(set_to_none)
            if next(steps) == 3:
                poison(True)

    original = step_module.velocity_loss

    def poison(on: bool) -> None:
        wrong = (lambda *tensors: original(*tensors) * float("nan")) if on else original
        monkeypatch.setattr(step_module, "velocity_loss", wrong)

    with monkeypatch.context() as patch:
        patch.setattr(optimizer_module.torch.optim, "AdamW", Poisoned)
        with pytest.raises(NonFiniteLossError, match=r"at step 5.*those of step\s+4.*learning_rate"):
            train_lora(config)
    poison(False)
    checkpoints = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert checkpoints[-1] == "step-000004"
    assert equal(lora_tensors(train_lora(config)), lora_tensors(healthy))


def test_a_crash_keeps_the_last_whole_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))
    original = step_module.predict_velocity

    def out_of_memory(*arguments: Any) -> Any:
        if next(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(step_module, "predict_velocity", out_of_memory)
    with pytest.raises(OutOfMemoryError, match=r"in step 5\. The 4 steps before it are kept"):
        train_lora(config)
    assert (Path(config.run_dir) / "checkpoints" / "step-000004").is_dir()


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_update_cut_short_is_not_saved(
    error: type[BaseException], config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights have moved and their average has not: they are of no step, whatever report came last."""
    averaged = dataclasses.replace(config, ema=EmaConfig(use_ema=True))
    unbroken, original = train_lora(named(averaged, "unbroken")), step_module.update_ema

    def cut(average: Any, parameters: Any, step: int, settings: EmaConfig) -> None:
        if step == 5:
            raise error
        original(average, parameters, step, settings)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "update_ema", cut)
        with pytest.raises((KeyboardInterrupt, OutOfMemoryError)) as caught:
            train_lora(averaged)
    assert error is KeyboardInterrupt or "goes on from its last checkpoint" in str(caught.value)
    checkpoints = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert checkpoints == ["step-000003"]
    result = train_lora(averaged)
    assert equal(lora_tensors(result), lora_tensors(unbroken))
    assert result.ema_file and unbroken.ema_file
    assert equal(load_file(result.ema_file), load_file(unbroken.ema_file))


def test_an_error_after_a_step_keeps_it(config: TrainConfig) -> None:
    class Breaks(SilentObserver):
        def on_step(self, report: StepReport) -> None:
            if report.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(config, Breaks())
    assert (Path(config.run_dir) / "checkpoints" / "step-000004").is_dir()


def test_fewer_steps_than_are_done_are_refused_before_the_model_is_read(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3))
    six = dataclasses.replace(constant, max_train_steps=6)
    first = train_lora(six)
    monkeypatch.setattr(run_module, "build_networks", None)
    for finished in (True, False):
        with pytest.raises(
            RunFolderError, match=r"'run' has 6 steps .* max_train_steps is 4.* to 6 or more, or choose"
        ):
            train_lora(dataclasses.replace(constant, max_train_steps=4))
        assert finished is False or train_lora(six) == first
        state = json.loads((Path(config.run_dir) / "run.json").read_text())
        state.pop("result", None)  # paused at step 6, then
        (Path(config.run_dir) / "run.json").write_text(json.dumps(state))


def test_checkpoints_are_limited_and_a_cut_one_is_passed_over(config: TrainConfig) -> None:
    unbroken = train_lora(named(config, "unbroken"))
    train_lora(config, StopAfter(10**9))
    folders = sorted((Path(config.run_dir) / "checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000009", "step-000012"]
    newest = folders[-1] / "optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-5])
    state = json.loads((Path(config.run_dir) / "run.json").read_text())
    del state["result"]
    (Path(config.run_dir) / "run.json").write_text(json.dumps(state))
    again = Steps()
    assert equal(lora_tensors(train_lora(config, again)), lora_tensors(unbroken))
    assert [report.step for report in again.reports] == [10, 11, 12]


def test_a_line_lost_between_checkpoint_and_metrics_comes_back(config: TrainConfig) -> None:
    unbroken = train_lora(named(config, "unbroken"))
    paused = train_lora(config, StopAfter(8))
    metrics = Path(config.run_dir) / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    assert len(lines) == paused.steps_done > 1
    metrics.write_text("".join(lines[:-1]) + lines[-1][:20])
    train_lora(config)
    rows, expected = read_rows(metrics), read_rows(unbroken.run_dir / "metrics.jsonl")
    assert [{**row, "seconds": 0} for row in rows] == [{**row, "seconds": 0} for row in expected]


def test_metrics_and_tensorboard_and_samples_are_written(config: TrainConfig) -> None:
    result = train_lora(config)
    rows = read_rows(result.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["step"] for row in rows if "validation_loss" in row] == [5, 10, 12]
    assert {"loss", "grad_norm", "learning_rate", "loss_by_sigma", "seconds"} <= rows[0].keys()
    assert [path.name for path in sorted((result.run_dir / "samples").glob("*.png"))] == [
        f"step-{step:06d}.png" for step in (5, 10, 12)
    ]
    assert list((result.run_dir / "tensorboard").glob("events*"))
    assert json.loads((result.run_dir / "config.json").read_text())["seed"] == 5


def test_training_lowers_the_loss_on_pairs_it_has_not_seen(config: TrainConfig) -> None:
    lively = dataclasses.replace(
        config,
        max_train_steps=60,
        lora=LoraConfig(lora_rank=16, lora_targets="all"),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        validation=ValidationConfig(validation_step_interval=10, num_validation_images=0),
    )
    observer = Steps()
    train_lora(lively, observer)
    losses = [report.validation_loss for report in observer.reports if report.validation_loss is not None]
    assert losses[-1] < 0.8 * losses[0], losses


def test_a_dataset_of_another_flavour_or_with_lost_entries_is_refused(
    config: TrainConfig, base_of: Any, encoded: EncodedDataset
) -> None:
    with pytest.raises(ValueError, match="encoded for edit-v1, and the model is edit-v2"):
        train_lora(dataclasses.replace(config, model=base_of("edit-v2")))
    entry = encoded.pairs[0]
    path = encoded.cache_dir / "latents" / entry.target[:2] / f"{entry.target}.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    try:
        with pytest.raises(DatasetError, match=entry.key):
            train_lora(config)
    finally:
        path.write_bytes(whole)


def test_validation_loss_is_the_same_number_for_the_same_weights(config: TrainConfig) -> None:
    from trainer_core.conditioning.encoded import load_encoded
    from trainer_core.qwen_image.transformer import load_transformer

    transformer = load_transformer(config.model, torch.device("cpu"))
    losses = []
    for _ in range(2):
        torch.rand(3)
        validator = validation_module.Validator(load_encoded(Path(config.encoded)), config.model, config.validation)
        losses.append(validator.loss(transformer, torch.device("cpu"), SILENT))
    assert losses[0] == losses[1] > 0


def test_tokens_stand_where_the_policy_has_them(model: ModelConfig) -> None:
    """ComfyUI and diffusers place odd sides and larger references differently, and so does a training for them."""
    odd, even = [[(1, 6, 7), (1, 8, 9)]], [[(1, 6, 8), (1, 6, 8)]]
    config, cpu = TrainConfig(run_dir="x", encoded="y", model=model), torch.device("cpu")
    placed = {}
    for policy in ("comfyui", "diffusers"):
        embed = step_module.build_networks(config, policy, SILENT).transformer.pos_embed
        placed[policy] = [embed(shapes, max_txt_seq_len=5, device=cpu) for shapes in (odd, even)]
    for part in (0, 1):  # pictures, prompt
        assert not torch.equal(placed["comfyui"][0][part], placed["diffusers"][0][part])
        assert torch.equal(placed["comfyui"][1][part], placed["diffusers"][1][part])
