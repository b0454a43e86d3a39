"""Two processes on the CPU under torchrun train the same as one process with twice the gradient accumulation."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from tests.support.forked import PATIENCE, Forked
from tests.support.jobs import write_job
from tests.support.narrow import read_rows
from trainer_core.__main__ import EXIT_STOPPED, main
from trainer_core.config import ModelConfig
from trainer_core.runs.folder import RunFolder

REPO = Path(__file__).parents[2]
STEPS = 6


@pytest.fixture
def job(base_of: Callable[[str], ModelConfig], tmp_path: Path) -> Path:
    """A job with dropout, pairs of two shapes and a validation."""
    return write_job(
        tmp_path,
        base_of("edit-v2"),
        num_pairs=6,
        sizes=((96, 96), (128, 96)),
        run_dir="runs/one",
        max_train_steps=STEPS,
        lora={"lora_rank": 4, "lora_dropout": 0.1},
        optimizer={"learning_rate": 1e-3, "lr_warmup_steps": 0},
        batching={"train_batch_size": 2, "gradient_accumulation_steps": 4},
        checkpoints={"checkpoint_step_interval": 2},
        validation={"validation_step_interval": 0},
    )


def launched(job: Path, *settings: str) -> subprocess.Popen[str]:
    """Starts `train` in two processes under torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone"]
    command += ["-m", "trainer_core", *arguments(job, *settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=REPO, text=True, stdout=pipe, stderr=pipe, env=environment)


@pytest.fixture
def store() -> dist.TCPStore:
    """Where processes of `forked` find each other. As torchrun does, it takes a port that is free and keeps it."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def forked(job: Path, store: dist.TCPStore, *settings: Sequence[str], machines: int = 1) -> list[Forked]:
    """Starts `train` with each of these settings in a process of its own, as torchrun would: processes 0, 1, ..."""
    size = len(settings)
    shared = {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size // machines)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    return [
        Forked("trainer_core", *arguments(job, *each), environment={**shared, "RANK": str(rank)})
        for rank, each in enumerate(settings)
    ]


def arguments(job: Path, *settings: str) -> list[str]:
    return ["train", str(job), *(word for each in settings for word in ("--set", each))]


def lora_at(job: Path, run: str) -> dict[str, torch.Tensor]:
    return load_file(job.parent / "runs" / run / f"{run}.safetensors")


def without_time(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in ("seconds", "peak_bytes")} for row in rows]


def test_two_processes_train_what_one_does_with_twice_the_accumulation(
    job: Path, caplog: pytest.LogCaptureFixture
) -> None:
    two = "run_dir=runs/two"
    process = launched(job, two, "batching.gradient_accumulation_steps=2")
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    assert Path(out.strip()).name == "two.safetensors" and out.count("\n") == 1
    assert len(re.findall(rf"step {STEPS} of {STEPS}", err)) == 1, "only one process reports"
    assert err.count("Running in 2 processes") == 1
    entries = sorted((job.parent / "cache").rglob("*.safetensors"))
    times = {entry: entry.stat().st_mtime_ns for entry in entries}
    assert main(arguments(job)) == 0
    assert {entry: entry.stat().st_mtime_ns for entry in entries} == times, "both runs use the same cache"
    one, other = lora_at(job, "one"), lora_at(job, "two")
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(other[name], one[name], rtol=1e-4, atol=1e-6)
    rows = [without_time(read_rows(job.parent / "runs" / run / "metrics.jsonl")) for run in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == STEPS
    for first, second in zip(*rows, strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-5)
        assert second["loss_by_sigma"] == pytest.approx(first["loss_by_sigma"], rel=1e-5)
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-4)
    # A run folder does not depend on the number of processes: a single one continues the run.
    caplog.clear()
    caplog.set_level(logging.INFO)
    assert main(arguments(job, two, f"max_train_steps={STEPS + 1}")) == 0
    assert re.findall(r"step (\d+) of \d+  loss", caplog.text) == [str(STEPS + 1)]


def test_a_lost_process_ends_the_run_with_its_last_step_kept(job: Path, store: dist.TCPStore) -> None:
    settings = ("max_train_steps=100000", "batching.gradient_accumulation_steps=1", "run_dir=runs/lost")
    settings += ("checkpoints.checkpoint_step_interval=100000",)
    leader, follower = forked(job, store, settings, settings)
    run = RunFolder(job.parent / "runs" / "lost")
    try:
        wait_for(lambda: len(run.metrics()) >= 3, leader)
        follower.kill()
        _, err = leader.communicate()
    finally:
        for each in (leader, follower):
            each.kill()
    assert leader.returncode == 1, err
    assert "Another of the 2 processes has ended" in err and "Start all processes again" in err
    kept = run.latest_checkpoint()
    assert kept is not None and kept.step >= 3
    assert kept.step >= run.metrics()[-1]["step"] - 1


def test_a_wish_to_stop_is_agreed_on(job: Path, store: dist.TCPStore) -> None:
    settings = ("max_train_steps=100000", "batching.gradient_accumulation_steps=2", "run_dir=runs/stopped")
    leader, follower = forked(job, store, settings, settings)
    run = RunFolder(job.parent / "runs" / "stopped")
    try:
        wait_for(lambda: len(run.metrics()) >= 2, leader)
        os.kill(follower.pid, signal.SIGTERM)  # only one of the two processes
        ends = [each.communicate() for each in (leader, follower)]
    finally:
        for each in (leader, follower):
            each.kill()
    assert (leader.returncode, follower.returncode) == (EXIT_STOPPED, EXIT_STOPPED), ends
    state, kept = run.state(), run.latest_checkpoint()
    assert state["state"] == "paused" and kept is not None and kept.step == state["steps"] >= 2


def test_a_loss_that_is_not_finite_ends_all_processes_before_the_weights_are_spoilt(
    job: Path, store: dist.TCPStore
) -> None:
    settings = ("batching.gradient_accumulation_steps=2", "optimizer.learning_rate=0.9", "run_dir=runs/wild")
    settings += ("lora.lora_alpha=1e18",)  # numbers overflow as soon as the adapter changes something
    ends = [(each.communicate()[1], each.returncode) for each in forked(job, store, settings, settings)]
    steps = [re.findall(r"NaN or infinite in step (\d+).*keeps the weights of step (\d+)", err) for err, _ in ends]
    run = RunFolder(job.parent / "runs" / "wild")
    kept = run.latest_checkpoint()
    assert [code for _, code in ends] == [1, 1] and kept is not None, ends
    assert steps == 2 * [[(str(kept.step + 1), str(kept.step))]], ends
    assert all(each.isfinite().all() for each in kept.lora.values())


def test_processes_that_do_not_start_alike_are_refused(job: Path, store: dist.TCPStore) -> None:
    """As on two machines without a shared disk: process 0 would resume at step 2, process 1 would start at step 0."""
    settings = ("batching.gradient_accumulation_steps=2", "optimizer.lr_scheduler=constant")
    assert main(arguments(job, "batching.gradient_accumulation_steps=4", *settings[1:], "max_train_steps=2")) == 0
    places = [(*settings, f"run_dir=runs/{run}") for run in ("one", "elsewhere")]
    for process in forked(job, store, *places, machines=2):
        _, err = process.communicate()
        assert process.returncode == 1, err
        assert re.search(r"process 0: step 2, weights \w{16}; process 1: step 0, weights \w{16}.* a disk that all", err)
    run = RunFolder(job.parent / "runs" / "one")
    assert run.steps_done() == 2 and not (job.parent / "runs" / "elsewhere").exists()


def wait_for(condition: Callable[[], bool], process: Forked) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        if time.monotonic() > until:
            raise TimeoutError("nothing happened")
        time.sleep(0.1)
