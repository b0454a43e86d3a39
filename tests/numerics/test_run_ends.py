"""How a run ends and continues: kept, finished, interrupted or refused, and what its folder contains then."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from tests.support.runs import Steps, StopAfter, equal, lora_tensors, named, twelve_steps
from trainer_core import run as run_module
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    EmaConfig,
    ExportConfig,
    LoraConfig,
    MemoryConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
)
from trainer_core.errors import OutOfMemoryError, RunFolderError
from trainer_core.events import SilentObserver, StepReport, Stop
from trainer_core.run import TrainResult, find_result, train_lora
from trainer_core.training import pair_losses as losses_module
from trainer_core.training import step as step_module


@pytest.fixture
def config(encoded: EncodedDataset, model: ModelConfig, tmp_path: Path) -> TrainConfig:
    return twelve_steps(encoded, model, tmp_path / "run")


def test_stop_and_keep_exports_and_is_answered_from_its_folder(config: TrainConfig, unbroken: TrainResult) -> None:
    kept = train_lora(config, StopAfter(8, Stop.KEEP))
    assert kept.stopped is Stop.KEEP and kept.lora_file and 0 < kept.steps_done < 12
    assert find_result(config) == kept == train_lora(config)
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
    renamed = dataclasses.replace(config, export=ExportConfig(trigger_words="sks"))
    newest = Path(config.run_dir) / "checkpoints" / f"step-{kept.steps_done:06d}"
    earlier = shutil.copytree(newest, newest.with_name("step-000001"))
    report = json.loads((earlier / "report.json").read_text())
    (earlier / "report.json").write_text(json.dumps({**report, "step": 1}))
    shutil.rmtree(newest)
    assert find_result(config) == kept
    with pytest.raises(RunFolderError, match=rf"at step {kept.steps_done}.*continue a kept run"):
        train_lora(renamed)
    shutil.rmtree(earlier)
    with pytest.raises(RunFolderError, match=rf"has saved {kept.steps_done} steps.*no usable checkpoint"):
        train_lora(renamed)
    assert equal(lora_tensors(kept), before)


def test_a_kept_run_that_went_on_is_no_longer_kept(config: TrainConfig) -> None:
    kept = train_lora(config, StopAfter(4, Stop.KEEP))
    paused = train_lora(config, StopAfter(4), continue_kept=True)
    assert paused.stopped is Stop.PAUSE and paused.steps_done > kept.steps_done
    assert find_result(config) is None
    assert train_lora(config).steps_done == 12


def test_a_finished_run_is_answered_at_once_and_goes_on_when_more_steps_are_wanted(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = dataclasses.replace(config, optimizer=OptimizerConfig(learning_rate=3e-3))
    first = train_lora(dataclasses.replace(constant, max_train_steps=6))
    with monkeypatch.context() as without_a_model:
        without_a_model.setattr(run_module, "prepare_training", None)
        assert train_lora(dataclasses.replace(constant, max_train_steps=6)) == first
    longer = train_lora(constant)
    assert longer.steps_done == 12
    assert equal(lora_tensors(longer), lora_tensors(train_lora(named(constant, "unbroken"))))


def test_a_run_folder_refuses_other_settings(config: TrainConfig) -> None:
    train_lora(dataclasses.replace(config), StopAfter(8))
    before = {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}
    other = dataclasses.replace(config, lora=LoraConfig(lora_rank=8), noise=NoiseConfig(flow_schedule_shift=3.0))
    with pytest.raises(RunFolderError) as caught:
        train_lora(other)
    assert "lora.lora_rank: was 4, now 8" in str(caught.value)
    assert "noise.flow_schedule_shift: was 1.73, now 3.0" in str(caught.value)
    assert before == {path: path.read_bytes() for path in Path(config.run_dir).rglob("*") if path.is_file()}


def test_a_folder_that_is_no_run_is_left_alone(config: TrainConfig) -> None:
    folder = Path(config.run_dir)
    folder.mkdir()
    (folder / "holiday.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not a run"):
        train_lora(config)
    assert [path.name for path in folder.iterdir()] == ["holiday.txt"]


def test_a_crash_keeps_the_last_whole_step(config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = iter(range(1000))
    original = losses_module.predict_velocities

    def out_of_memory(*arguments: Any) -> Any:
        if next(calls) == 9:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*arguments)

    monkeypatch.setattr(losses_module, "predict_velocities", out_of_memory)
    with pytest.raises(OutOfMemoryError, match=r"in step 5\. The run is saved up to step 4"):
        train_lora(config)
    assert (Path(config.run_dir) / "checkpoints" / "step-000004").is_dir()


@pytest.fixture(scope="module")
def averaged_result(
    encoded: EncodedDataset, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> TrainResult:
    """An unbroken run with an average of its weights."""
    settings = twelve_steps(encoded, model, tmp_path_factory.mktemp("averaged") / "run")
    return train_lora(dataclasses.replace(settings, ema=EmaConfig(use_ema=True)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_an_update_cut_short_is_not_saved(
    error: type[BaseException], config: TrainConfig, averaged_result: TrainResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights have moved but their average has not, so they belong to no step, whatever was reported last."""
    averaged = dataclasses.replace(config, ema=EmaConfig(use_ema=True))
    original = step_module.update_ema

    def cut(average: Any, parameters: Any, step: int, settings: EmaConfig) -> None:
        if step == 5:
            raise error
        original(average, parameters, step, settings)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "update_ema", cut)
        with pytest.raises((KeyboardInterrupt, OutOfMemoryError)) as caught:
            train_lora(averaged)
    assert error is KeyboardInterrupt or "resumes from its last checkpoint" in str(caught.value)
    checkpoints = sorted(path.name for path in (Path(config.run_dir) / "checkpoints").iterdir())
    assert checkpoints == ["step-000003"]
    result = train_lora(averaged)
    assert equal(lora_tensors(result), lora_tensors(averaged_result))
    assert result.ema_file and averaged_result.ema_file
    assert equal(load_file(result.ema_file), load_file(averaged_result.ema_file))


def test_an_error_after_a_step_keeps_it(config: TrainConfig) -> None:
    class Breaks(SilentObserver):
        def on_step(self, report: StepReport) -> None:
            if report.step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_lora(config, Breaks())
    assert (Path(config.run_dir) / "checkpoints" / "step-000004").is_dir()


def test_a_result_of_a_version_with_fewer_settings_is_found(config: TrainConfig) -> None:
    result, path = train_lora(config, StopAfter(4, Stop.KEEP)), Path(config.run_dir) / "run.json"
    state = json.loads(path.read_text())
    del state["key"]["lora"]["lora_type"], state["key"]["rollout"], state["result"]["export"]["trigger_words"]
    path.write_text(json.dumps(state))
    assert find_result(config) == result
    other = dataclasses.replace(config, lora=dataclasses.replace(config.lora, lora_type="dora"))
    assert find_result(other) is None
    with pytest.raises(RunFolderError, match="lora_type: was 'lora', now 'dora'"):
        train_lora(other)


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
        state.pop("result", None)  # makes it a run that is paused at step 6
        (Path(config.run_dir) / "run.json").write_text(json.dumps(state))


def test_checkpoints_are_limited_and_a_cut_one_is_passed_over(config: TrainConfig, unbroken: TrainResult) -> None:
    config = dataclasses.replace(config, validation=dataclasses.replace(config.validation, keep_best=False))
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


@pytest.mark.parametrize("ends", ["finished", "failed"])
def test_the_network_is_freed_whatever_refers_to_its_blocks(
    ends: str, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code may. Streamed weights in host memory and kept activations go with it."""
    memory = MemoryConfig(memory="manual", blocks_to_stream=1, activation_offload=True)
    config = dataclasses.replace(config, memory=memory, max_train_steps=3)
    build, blocks, freed = step_module.apply_memory, [], []

    def watched(transformer: Any, stream: Any, *others: Any) -> Any:
        copies = build(transformer, stream, *others)
        blocks.extend(transformer.transformer_blocks)
        layer = blocks[0].attn.to_q.base_layer
        freed.extend(map(weakref.ref, (stream, copies.offload, layer.weight, blocks[-1].attn.to_v.base_layer.weight)))
        return copies

    monkeypatch.setattr(step_module, "apply_memory", watched)
    if ends == "failed":
        monkeypatch.setattr(run_module, "update_weights", lambda *_: 1 / 0)
    gc.collect()
    gc.disable()
    try:
        if ends == "finished":
            train_lora(config)
        else:
            with pytest.raises(ZeroDivisionError):
                train_lora(config)
        assert len(blocks) > 1 and [each() for each in freed] == [None] * 4
    finally:
        gc.enable()
