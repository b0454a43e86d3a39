"""A full, read-only or failing disk: found before the start where it can be, and otherwise nothing is lost."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.record_writer import RecordWriter

from tests.support.jobs import write_job
from tests.support.narrow import make_pairs, small_encoding
from tests.support.runs import equal, lora_tensors, twelve_steps
from trainer_core import files
from trainer_core.__main__ import main
from trainer_core.conditioning.encode import encode_dataset, encode_planned, plan_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import CheckpointConfig, EmaConfig, ModelConfig, OptimizerConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.errors import DiskError
from trainer_core.job import load_job, pair_job, plan_parts
from trainer_core.planning import disk_space
from trainer_core.planning.disk_space import DiskUse, cache_use, check_disk, run_use
from trainer_core.planning.preparation import prepare_training
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.run import TrainResult, train_lora


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))


def tensor_bytes_in(folder: Path) -> int:
    """Without the files' headers, which are large in a narrow model."""
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in folder.rglob("*.safetensors"))
    return bytes_in(folder) - headers


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """`free(1000)` makes all disks have 1,000 bytes of free space."""
    return lambda size: monkeypatch.setattr(disk_space, "free_disk_bytes", lambda _: size)


# Before the start


def test_the_cache_takes_as_much_as_was_computed(base_of: Callable[[str], ModelConfig], tmp_path: Path) -> None:
    pairs = make_pairs(tmp_path / "pairs", 5, ((96, 96), (128, 96)), num_references=2)
    planned = plan_dataset(
        pair_folders(pairs), BaseModel(base_of("edit-v2")), small_encoding(num_eval_images=2), tmp_path / "cache"
    )
    (use,) = cache_use([planned])
    assert use.folder == tmp_path / "cache"
    encode_planned(planned)
    assert use.size == pytest.approx(
        bytes_in(tmp_path / "cache"), rel=0.2
    )  # the sizes of headers and prompts are estimated


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "adafactor"])
def test_checkpoints_and_files_take_as_much_as_was_computed(
    optimizer: Any, ema: bool, encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    limits = CheckpointConfig(checkpoint_step_interval=1, checkpoints_total_limit=1)
    config = dataclasses.replace(
        twelve_steps(encoded, model, tmp_path / "run"),
        max_train_steps=1,
        checkpoints=limits,
        optimizer=OptimizerConfig(optimizer=optimizer),
        ema=EmaConfig(use_ema=ema),
    )
    prepared = prepare_training(config)
    use = run_use(prepared.config, prepared.model.size, prepared.work)
    train_lora(config)
    written, checkpoint = tensor_bytes_in(tmp_path / "run"), tensor_bytes_in(tmp_path / "run" / "checkpoints")
    assert use.size == pytest.approx(written, rel=0.02)
    more = dataclasses.replace(prepared.config, max_train_steps=9)
    left = run_use(more, prepared.model.size, prepared.work).size + bytes_in(tmp_path / "run")
    # The new checkpoint is complete before the old one goes, and steps 5 and 9 are validated instead of step 1. If step
    # 5 is the best one, its checkpoint stays too, and its LoRA is copied.
    step_lora = tensor_bytes_in(tmp_path / "run" / "samples")
    assert step_lora
    assert left == pytest.approx(written + 2 * checkpoint + step_lora + step_lora / (1 + ema), rel=0.02)


def test_damaged_checkpoints_need_their_space_again(
    encoded: EncodedDataset, model: ModelConfig, tmp_path: Path
) -> None:
    """Those that were set aside, those that were cut, and what a killed process left."""
    config = dataclasses.replace(
        twelve_steps(encoded, model, tmp_path / "run"),
        max_train_steps=1,
        checkpoints=CheckpointConfig(checkpoint_step_interval=1, checkpoints_total_limit=1),
        optimizer=OptimizerConfig(),
    )
    prepared = prepare_training(config)
    train_lora(config)
    more = dataclasses.replace(prepared.config, max_train_steps=9)

    def needed() -> int:
        return run_use(more, prepared.model.size, prepared.work).size

    checkpoint = tmp_path / "run" / "checkpoints" / "step-000001"
    with_it, size = needed(), bytes_in(checkpoint)
    for name in ("step-000001.damaged", "step-000001.damaged-2", ".step-000001.0123abcd-1.0123abcd.tmp"):
        checkpoint = checkpoint.rename(checkpoint.with_name(name))
        assert needed() == with_it + size, name
    checkpoint = checkpoint.rename(checkpoint.with_name("step-000001"))
    assert needed() == with_it
    cut = checkpoint / "lora.safetensors"
    whole = cut.stat().st_size
    cut.write_bytes(cut.read_bytes()[:-1])
    assert needed() == with_it + whole


@pytest.mark.parametrize(
    ("size", "what"), [(1000, "refused"), (1100, "refused"), (1200, "tight"), (1450, "tight"), (1550, "")]
)
def test_too_little_space_is_refused_and_little_is_said(size: int, what: str, tmp_path: Path, free: Any) -> None:
    free(size)
    uses = [DiskUse(tmp_path / "cache", "the cache", 1000), DiskUse(tmp_path / "run", "the run", 230)]
    if what == "refused":
        with pytest.raises(DiskError) as caught:
            check_disk(uses)
        said = str(caught.value)
    else:
        said = " ".join(check_disk(uses))
    assert said.startswith({"refused": "The disk is too full. ", "tight": "Disk space is tight. ", "": ""}[what])
    wanted = (
        f"about 1.2 kB are needed: 1.0 kB for the cache in {tmp_path}/cache and 230 bytes for the run in {tmp_path}/run"
    )
    assert bool(said) == (wanted in said)


@pytest.fixture
def job(model: ModelConfig, tmp_path: Path) -> Path:
    return write_job(tmp_path, model, num_pairs=3, validation={"num_validation_images": 0})


@pytest.mark.parametrize("command", ["check", "encode", "train"])
def test_commands_refuse_before_the_start(command: str, job: Path, free: Any, caplog: pytest.LogCaptureFixture) -> None:
    free(100)
    assert main([command, str(job)]) == 1
    assert "The disk is too full. 100 bytes of disk space are free" in caplog.text
    assert not list((job.parent / "cache").rglob("*.safetensors"))


def test_the_plan_says_what_is_needed_and_free(job: Path, free: Any, capsys: pytest.CaptureFixture[str]) -> None:
    free(5_000_000_000)
    assert main(["plan", str(job)]) == 0
    said = capsys.readouterr().out
    assert "for the cache of encoded pairs, 5.0 GB free in" in said
    assert "for 1 checkpoint of" in said


def test_variants_of_captions_count_as_what_is_encoded(job: Path) -> None:
    texts, sizes = [], []
    for changes in (
        [],
        ["dataset.captions.caption_shuffle_count=4", "dataset.captions.caption_shuffle_split_on=space"],
    ):
        loaded = load_job(job, changes)
        ((_, planned),) = plan_parts(loaded, pair_job(loaded))
        texts.append(sum(len(prompts) for _, prompts in planned.missing.prompts))
        sizes.append(sum(use.size for use in cache_use([planned])))
    assert texts[1] >= texts[0] + 3 * 3 and sizes[1] > sizes[0]


def test_a_folder_that_is_read_only_is_refused_before_the_start(
    job: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(disk_space.os, "access", lambda *_: False)
    assert main(["train", str(job)]) == 1
    assert f"The folder {job.parent}/cache can't be written to" in caplog.text


# On the way


class Disk:
    """Writes that fail from a number on, as on a full disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.writes, self.room = 0, 10**9
        self._fsync = os.fsync
        monkeypatch.setattr(files.os, "fsync", self._counted)

    def _counted(self, descriptor: int) -> None:
        self.writes += 1
        if self.writes > self.room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self._fsync(descriptor)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


@pytest.mark.parametrize("room", [0, 2, 7, 16])
def test_a_run_on_a_disk_that_fills_up_ends_in_words_and_loses_nothing(
    room: int, disk: Disk, encoded: EncodedDataset, model: ModelConfig, unbroken: TrainResult, tmp_path: Path
) -> None:
    config = twelve_steps(encoded, model, tmp_path / "run")
    disk.room = room
    with pytest.raises(DiskError, match=r"^The disk is full, so .*run.* can't be written: .* are free\. Free disk"):
        train_lora(config)
    disk.room = 10**9
    assert equal(lora_tensors(train_lora(config)), lora_tensors(unbroken))


@pytest.mark.parametrize("room", [0, 30])
def test_a_full_disk_while_tensorboard_is_written_does_not_hang(
    room: int,
    monkeypatch: pytest.MonkeyPatch,
    encoded: EncodedDataset,
    model: ModelConfig,
    unbroken: TrainResult,
    tmp_path: Path,
) -> None:
    config, written = twelve_steps(encoded, model, tmp_path / "run"), list[bytes]()
    original = RecordWriter.write

    def write(writer: RecordWriter, data: bytes) -> None:
        written.append(data)
        if len(written) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(writer, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", write)
        with pytest.raises(DiskError, match=r"^The disk is full"):
            train_lora(config)
    assert equal(lora_tensors(train_lora(config)), lora_tensors(unbroken))


def test_a_complete_cache_works_on_a_read_only_disk(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    dataset_config, cache = make_pairs(tmp_path / "pairs", 4), tmp_path / "cache"

    def encode() -> EncodedDataset:
        dataset = pair_folders(dataset_config, checked_dir=cache / "checked")
        return encode_dataset(dataset, BaseModel(model), small_encoding(), cache)

    first = encode()
    (cache / "checked").rename(cache / "not checked")  # its results can't be written
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*")}
    make_read_only(cache, monkeypatch)
    assert encode() == first
    assert "The results of the check are not kept" in caplog.text
    config = dataclasses.replace(twelve_steps(first, model, tmp_path / "run"), max_train_steps=3)
    assert train_lora(config).steps_done == 3
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == before


def test_what_a_read_only_cache_lacks_is_named(
    model: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, cache = pair_folders(make_pairs(tmp_path / "pairs", 3)), tmp_path / "cache"
    encode = functools.partial(encode_dataset, dataset, BaseModel(model), cache_dir=cache)
    encode(encoding=small_encoding())
    make_read_only(cache, monkeypatch)
    with pytest.raises(DiskError, match=r"cache.* can't be written, because its disk is read-only"):
        encode(encoding=small_encoding(resolution=64))


def make_read_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes every change below the folder fail as on a read-only disk. Root may change files of any permission."""

    def refuse(path: Path) -> None:
        if path.is_relative_to(folder):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

    def guarded(name: str, changes: Callable[..., bool]) -> None:
        original = getattr(Path, name)

        def call(path: Path, *arguments: Any, **named: Any) -> Any:
            if changes(path, *arguments, **named):
                refuse(path)
            return original(path, *arguments, **named)

        monkeypatch.setattr(Path, name, call)

    guarded("open", lambda _path, mode="r", *_, **__: set(mode) & set("wax+") != set())
    guarded("mkdir", lambda path, *_, **__: not path.exists())
    for name in ("replace", "rename", "unlink", "touch"):
        guarded(name, lambda *_, **__: True)
