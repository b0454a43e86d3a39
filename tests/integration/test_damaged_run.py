"""A run folder that was damaged: nothing of it is overwritten, and what can be used is used with the same result."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import PauseAt, equal, lora_tensors
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    BatchingConfig,
    CheckpointConfig,
    EmaConfig,
    LoraConfig,
    ModelConfig,
    NoiseConfig,
    OptimizerConfig,
    TrainConfig,
    resume_key,
)
from trainer_core.errors import RunFolderError, TrainerError
from trainer_core.events import SilentObserver, StepReport
from trainer_core.files import read_tensors
from trainer_core.run import TrainResult, train_lora
from trainer_core.runs.folder import RunFolder
from trainer_core.runs.result import check_start


@pytest.fixture(scope="module")
def finished(
    encoded: EncodedDataset, model: ModelConfig, tmp_path_factory: pytest.TempPathFactory
) -> tuple[TrainConfig, TrainResult]:
    """A finished run of four steps with the checkpoints of steps 2 and 4."""
    config = TrainConfig(
        run_dir=str(tmp_path_factory.mktemp("finished") / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=4,
        lora=LoraConfig(lora_rank=2),
        optimizer=OptimizerConfig(learning_rate=1e-2),
        checkpoints=CheckpointConfig(checkpoint_step_interval=2, checkpoints_total_limit=2),
    )
    return config, train_lora(config)


@pytest.fixture
def config(finished: tuple[TrainConfig, TrainResult], tmp_path: Path) -> TrainConfig:
    """The settings of a copy of the finished run."""
    shutil.copytree(finished[0].run_dir, tmp_path / "run")
    return dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    """The files of a run folder that a refusal must not change."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != "run.lock")
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def checkpoint_files(config: TrainConfig, name: str = "lora.safetensors") -> list[Path]:
    return sorted(Path(config.run_dir, "checkpoints").glob(f"step-*/{name}"))


def delete_all(config: TrainConfig) -> None:
    shutil.rmtree(Path(config.run_dir, "checkpoints"))


def empty(config: TrainConfig) -> None:
    delete_all(config)
    Path(config.run_dir, "checkpoints").mkdir()


def cut_all(config: TrainConfig) -> None:
    for path in checkpoint_files(config):
        path.write_bytes(path.read_bytes()[:1000])


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def flip_all(config: TrainConfig) -> None:
    for path in checkpoint_files(config, "optimizer.safetensors"):
        flip(path, -50)


@pytest.mark.parametrize("damage", [delete_all, empty, cut_all, flip_all])
def test_a_run_that_lost_its_checkpoints_does_not_start_again(
    damage: Callable[[TrainConfig], None],
    config: TrainConfig,
    encoded: EncodedDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    damage(config)
    run, before = Path(config.run_dir), content(Path(config.run_dir))
    longer = dataclasses.replace(config, max_train_steps=5)
    monkeypatch.setattr("trainer_core.run.build_networks", None)  # refused before anything is loaded
    for _ in range(2):
        with pytest.raises(RunFolderError) as caught:
            train_lora(longer)
        message = str(caught.value)
        assert "'run' has saved 4 steps" in message and str(run / "checkpoints") in message
        assert f"set init_lora to {run / 'run.safetensors'}" in message and "another name" in message
    after = content(run)
    assert sorted(after.values()) == sorted(before.values()), "files are renamed at most"
    assert after["run.safetensors"] == before["run.safetensors"]
    with pytest.raises(RunFolderError, match="has saved 4 steps"):  # also before the dataset is encoded
        check_start(longer, encoded)
    result = train_lora(config)
    assert result.steps_done == 4, "the finished run still has its result"


def test_a_lora_file_that_was_cut_is_no_result(config: TrainConfig) -> None:
    lora_file = Path(config.run_dir, "run.safetensors")
    whole, tensors = lora_file.read_bytes(), read_tensors(lora_file)
    lora_file.write_bytes(whole[:1000])
    result = train_lora(config)
    assert result.lora_file == lora_file and equal(read_tensors(lora_file), tensors), "exported from its checkpoint"
    delete_all(config)
    lora_file.write_bytes(whole[:1000])
    with pytest.raises(RunFolderError, match=r"'run' has saved 4 steps") as caught:
        train_lora(config)
    assert "init_lora" not in str(caught.value), "the file can't be loaded"


def test_so_does_a_paused_run_and_one_that_was_killed(config: TrainConfig, tmp_path: Path) -> None:
    paused = dataclasses.replace(config, run_dir=str(tmp_path / "paused"))
    train_lora(paused, PauseAt(3))
    delete_all(paused)
    with pytest.raises(RunFolderError, match=r"'paused' has saved 3 steps") as caught:
        train_lora(paused)
    assert "init_lora" not in str(caught.value), "there is no LoRA file yet"
    state = Path(paused.run_dir, "run.json")
    values = json.loads(state.read_text())
    state.write_text(json.dumps({"key": values["key"], "state": "started", "saved": 2}))
    with pytest.raises(RunFolderError, match=r"'paused' has saved 2 steps"):
        train_lora(paused)
    state.write_text(json.dumps({"key": values["key"], "state": "started"}))  # killed before its first checkpoint
    assert train_lora(paused).steps_done == 4


@pytest.mark.parametrize(
    ("name", "place"),
    [("lora.safetensors", 3), ("optimizer.safetensors", 150), ("lora.safetensors", 80), ("optimizer.safetensors", -1)],
    ids=["length", "header", "digest", "data"],
)
def test_one_damaged_checkpoint_is_named_and_the_one_before_it_takes_over(
    name: str,
    place: int,
    config: TrainConfig,
    finished: tuple[TrainConfig, TrainResult],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = Path(config.run_dir)
    damaged = run / "checkpoints" / "step-000004"
    flip(damaged / name, place)
    before = content(damaged)
    (run / "run.safetensors").unlink()
    result = train_lora(config)
    assert equal(lora_tensors(result), lora_tensors(finished[1]))
    assert str(damaged) in caplog.text and "step-000004.damaged" in caplog.text
    assert content(damaged.with_name("step-000004.damaged")) == before
    for each in ("lora.safetensors", "optimizer.safetensors"):
        wanted = Path(finished[0].run_dir, "checkpoints", "step-000004", each)
        assert (damaged / each).read_bytes() == wanted.read_bytes()


def test_a_checkpoint_of_other_layers_is_refused(config: TrainConfig) -> None:
    """Files without a digest, as an older version wrote them, could hold anything."""
    from safetensors.torch import load_file, save_file

    for path in checkpoint_files(config):
        tensors = load_file(path)
        first = next(iter(tensors))
        save_file({**tensors, first: tensors[first][:1].clone()}, path)
    with pytest.raises(RunFolderError, match=r"step 4 in .*checkpoints does not match the layers"):
        train_lora(dataclasses.replace(config, max_train_steps=5))


def damaged_states(text: str) -> dict[str, bytes]:
    values = json.loads(text)
    result = values["result"]
    changed: dict[str, object] = {
        "a list": [],
        "null": None,
        "without key": {name: each for name, each in values.items() if name != "key"},
        "key is a list": {**values, "key": [1]},
        "result is 5": {**values, "result": 5},
        "result without steps": {**values, "result": {"lora_file": "x.safetensors"}},
        "the file lies elsewhere": {**values, "result": {**result, "lora_file": "../x.safetensors"}},
        "steps is a text": {**values, "result": {**result, "steps": "4"}},
        "validated is a list": {**values, "validated": []},
        "state is unknown": {**values, "state": "x" * 10_000},
    }
    return {
        "empty": b"",
        "nested": b"[" * 100_000,
        "not UTF-8": b"\xff\xfe" + text.encode(),
        "cut": text[: len(text) // 2].encode(),
        "zeros": bytes(len(text)),
        "digits": b'{"key": {}, "steps": ' + b"9" * 5000 + b"}",
        **{name: json.dumps(each).encode() for name, each in changed.items()},
    }


def test_a_damaged_run_json_is_named(config: TrainConfig, encoded: EncodedDataset) -> None:
    state = Path(config.run_dir, "run.json")
    whole = state.read_text(encoding="utf-8")
    for what, data in damaged_states(whole).items():
        state.write_bytes(data)
        before = content(Path(config.run_dir))
        for call in (lambda: train_lora(config), lambda: check_start(config, encoded)):
            with pytest.raises(RunFolderError) as caught:
                call()
            message = str(caught.value)
            assert str(state) in message and "another name" in message and len(message) < 1000, what
        assert content(Path(config.run_dir)) == before, what
    for samples in ("x", {"coming": 1}, {"step": 4, "grid_file": "../x.png"}):
        state.write_text(json.dumps({**json.loads(whole), "samples": samples}), encoding="utf-8")
        result = train_lora(config)
        assert result.steps_done == 4 and result.samples is None


@pytest.mark.parametrize("name", ["checkpoints", "samples", "tensorboard", "base_pictures"])
def test_a_file_in_place_of_a_folder_is_named(name: str, config: TrainConfig) -> None:
    place = Path(config.run_dir, name)
    if place.exists():
        place.rename(place.with_name("moved"))
    place.write_text("not a folder")
    with pytest.raises(RunFolderError, match=rf"{name} is a file, but the run needs a folder"):
        train_lora(dataclasses.replace(config, max_train_steps=5))
    assert place.read_text() == "not a folder"


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl", "run.lock", "run.safetensors"])
def test_a_folder_in_place_of_a_file_is_named(name: str, config: TrainConfig) -> None:
    place = Path(config.run_dir, name)
    place.unlink(missing_ok=True)
    place.mkdir()
    with pytest.raises(RunFolderError, match=rf"{name}.* is (a folder|not a file)|{name}: it is not a file"):
        train_lora(dataclasses.replace(config, max_train_steps=5))


def test_a_file_in_place_of_the_run_folder_is_named(config: TrainConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(TrainerError, match=r"file is a file, but .* needs? a folder of that name"):
        train_lora(dataclasses.replace(config, run_dir=str(tmp_path / "file")))
    assert (tmp_path / "file").read_text() == "mine"


def test_damaged_lines_of_the_metrics_are_left_out(config: TrainConfig, caplog: pytest.LogCaptureFixture) -> None:
    metrics = Path(config.run_dir, "metrics.jsonl")
    lines = metrics.read_bytes().splitlines(keepends=True)
    damaged = [b"\xff\xfe\n", b"5\n", b"[]\n", b'{"loss": 1}\n', b'{"step": "1", "loss": 2}\n', b"[" * 50_000 + b"\n"]
    metrics.write_bytes(lines[0] + b"".join(damaged) + b"".join(lines[1:]))
    train_lora(dataclasses.replace(config, max_train_steps=5))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5] and metrics.read_bytes().startswith(b"".join(lines))
    assert f"{metrics} has 6 damaged lines" in caplog.text


def test_killed_while_run_json_was_first_written(config: TrainConfig, tmp_path: Path) -> None:
    fresh = dataclasses.replace(config, run_dir=str(tmp_path / "fresh"))
    Path(fresh.run_dir).mkdir()
    for name in (".run.0badcafe-1.0badcafe.tmp.json", ".run.1.0badcafe.tmp.json", "run.lock"):
        (Path(fresh.run_dir) / name).write_text("")
    assert train_lora(fresh).steps_done == 4
    assert not list(Path(fresh.run_dir).rglob(".*"))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    with pytest.raises(RunFolderError, match=r"is not a run: run\.json is missing"):
        train_lora(dataclasses.replace(config, run_dir=str(tmp_path / "mine")))


@pytest.mark.parametrize(
    ("changes", "differing", "since"),
    [
        ({}, "", 0),
        ({"noise": NoiseConfig(loss_type="huber")}, "the loss by huber_schedule snr", 2),
        ({"noise": NoiseConfig(loss_type="huber", huber_schedule="constant")}, "", 0),
        ({"ema": EmaConfig(use_ema=True)}, "the average of the weights", 2),
        ({"batching": BatchingConfig(train_batch_size=2)}, "the order of the pairs", 3),
        ({"products": "8bit"}, "the rounding of 8-bit products", 4),
    ],
)
def test_a_run_of_an_older_version_goes_on_only_if_its_steps_fit(
    changes: dict[str, Any], differing: str, since: int, encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    """`since`: the first rules with which the setting computes what it computes today."""
    if products := changes.get("products"):
        model = dataclasses.replace(model, base_model_precision="int8-quanto", matmul_precision=products)
    others = {name: each for name, each in changes.items() if name != "products"}
    config = TrainConfig(
        run_dir=str(tmp_path / "run"), encoded=str(encoded.manifest), model=model, max_train_steps=2, **others
    )
    pause = PauseAt(1)
    assert train_lora(config, pause).steps_done == 1
    state = Path(config.run_dir, "run.json")
    values = json.loads(state.read_text())
    assert values.pop("rules") == 4
    state.write_text(json.dumps(values))  # as older versions wrote it
    before = content(Path(config.run_dir))
    if differing:
        for call in (lambda: train_lora(config), lambda: check_start(config, encoded)):
            with pytest.raises(RunFolderError, match=f"computes {differing}.*further steps would not fit its 1 steps"):
                call()
        assert content(Path(config.run_dir)) == before
        state.write_text(json.dumps({**values, "rules": since}))
    assert train_lora(config).steps_done == 2
    state.write_text(json.dumps({key: each for key, each in json.loads(state.read_text()).items() if key != "rules"}))
    assert train_lora(config).steps_done == 2, "a finished run keeps its result"


def test_a_run_of_an_older_version_without_steps_starts_by_the_new_rules(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    config = TrainConfig(
        run_dir=str(tmp_path / "run"),
        encoded=str(encoded.manifest),
        model=model,
        max_train_steps=2,
        ema=EmaConfig(use_ema=True),
    )
    with RunFolder.open(Path(config.run_dir), resume_key(config), encoded):
        pass
    state = Path(config.run_dir, "run.json")
    values = json.loads(state.read_text())
    state.write_text(json.dumps({key: each for key, each in values.items() if key != "rules"}))
    assert train_lora(config, PauseAt(1)).steps_done == 1
    assert train_lora(config).steps_done == 2


def test_noise_levels_that_pipelines_round_belong_to_the_rules(config: TrainConfig, encoded: EncodedDataset) -> None:
    state = Path(config.run_dir, "run.json")
    values = json.loads(state.read_text())
    state.write_text(json.dumps({key: each for key, each in values.items() if key != "rules"}))
    longer = dataclasses.replace(config, max_train_steps=5)
    assert not check_start(longer, encoded)
    with pytest.raises(RunFolderError, match="the noise levels by preprocessing diffusers differently"):
        check_start(longer, dataclasses.replace(encoded, preprocessing="diffusers"))


class DeletesTheFolder(SilentObserver):
    """Deletes the run folder after a step."""

    def __init__(self, folder: str, step: int) -> None:
        self.folder, self.step = folder, step

    def on_step(self, report: StepReport) -> None:
        if report.step == self.step:
            shutil.rmtree(self.folder)


def test_a_folder_that_is_deleted_while_it_trains_is_made_again(
    finished: tuple[TrainConfig, TrainResult], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(finished[0], run_dir=str(tmp_path / "run"))
    result = train_lora(config, DeletesTheFolder(config.run_dir, 3))
    assert result.steps_done == 4 and f"The run folder {config.run_dir} was deleted while it was in use" in caplog.text
    assert equal(lora_tensors(result), lora_tensors(finished[1]))
    assert train_lora(config) == result
    longer = train_lora(dataclasses.replace(config, max_train_steps=5))
    assert longer.steps_done == 5
