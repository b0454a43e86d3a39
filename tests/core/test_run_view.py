"""What the page shows of an intact or damaged run folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.comfyui import REPO
from trainer_core.config import TrainConfig, resume_key
from trainer_core.events import MEASURED
from trainer_core.pictures.grid import GridRow
from trainer_core.pictures.sample_pictures import save_sample_pictures
from trainer_core.runs import lock
from trainer_core.runs import view as run_view
from trainer_core.runs.folder import RunFolder
from trainer_core.runs.lock import is_in_use


def row(step: int, **more: Any) -> dict[str, Any]:
    return {"step": step, "num_steps": 100, "loss": float(step), "learning_rate": 1e-4, "seconds": 0.5, **more}


def make_run(folder: Path, rows: list[dict[str, Any]], **state: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"key": {}, "state": "started", **state}))
    (folder / "config.json").write_text(json.dumps({"max_train_steps": 100, "run_dir": str(folder)}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(each) + "\n" for each in rows))
    return folder


def test_newest_first_and_only_runs(tmp_path: Path):
    assert run_view.run_folders(tmp_path / "none", 5) == []
    for number in range(3):
        make_run(tmp_path / f"run{number}", [])
        os.utime(tmp_path / f"run{number}" / "run.json", (number, number))
    (tmp_path / "no run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run0")
    names = [folder.name for folder in run_view.run_folders(tmp_path, 5)]
    assert names == ["run2", "run1", "run0"]
    assert len(run_view.run_folders(tmp_path, 2)) == 2


def test_summary(tmp_path: Path):
    samples = {"step": 2, "grid_file": "step-000002.png", "psnr_base": 9.0, "psnr_lora": float("inf"), "psnr_vae": 20.0}
    run = make_run(tmp_path / "mine", [row(1), row(2, peak_bytes=7)], state="paused", samples=samples)
    found = run_view.summary(run)
    assert (found["run_name"], found["state"], found["step"], found["num_steps"]) == ("mine", "paused", 2, 100)
    assert (found["loss"], found["peak_bytes"]) == (2.0, 7)
    # browsers can't parse infinity in JSON
    assert found["psnr"] == {"base": 9.0, "lora": None, "ema": None, "vae": 20.0}
    assert str(tmp_path) not in json.dumps(found)


def test_a_line_cut_short_is_passed_over(tmp_path: Path):
    run = make_run(tmp_path / "mine", [row(1), row(2)])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert run_view.summary(run)["step"] == 2
    assert run_view.curve(run, 10)["steps"] == [1, 2]


@pytest.mark.parametrize("text", ["", "[1]", "null", '"x"', "[" * 20_000])
def test_damaged_files_are_as_missing_ones(text: str, tmp_path: Path):
    run = make_run(tmp_path / "mine", [])
    for name in ("run.json", "config.json", "metrics.jsonl", "graph.json"):
        (run / name).write_text(text)
    assert run_view.summary(run)["step"] == 0
    assert run_view.curve(run, 10) == {"steps": [], "loss": [], "learning_rate": [], "measured": {}}
    assert run_view.read_config(run) == {} and run_view.read_graph(run) == {} and run_view.samples(run) == []


def test_a_long_curve_is_thinned_to_means(tmp_path: Path):
    rows = [row(step, **({"validation_loss": 0.5} if step % 250 == 0 else {})) for step in range(1, 1001)]
    found = run_view.curve(make_run(tmp_path / "mine", rows), 100)
    assert len(found["steps"]) == len(found["loss"]) == len(found["learning_rate"]) == 100
    assert (found["steps"][0], found["loss"][0]) == (10, 5.5)
    assert found["steps"][-1] == 1000
    assert found["measured"] == {"validation_loss": [[step, 0.5] for step in (250, 500, 750, 1000)]}


@pytest.mark.parametrize("name", MEASURED)
def test_of_a_very_long_file_not_every_line_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run_view, "_MAX_ROWS", 50)
    rows = [row(step, **({name: 0.5} if step == 333 else {})) for step in range(1, 1001)]
    found = run_view.curve(make_run(tmp_path / "mine", rows), 1000)
    assert 40 <= len(found["steps"]) <= 60
    assert found["measured"] == {name: [[333, 0.5]]}


def test_settings_hide_where_things_lie(tmp_path: Path):
    run = make_run(tmp_path / "mine", [])
    settings = {"model": {"base": "/data/models/Edit", "flavour": "edit-v1"}, "list": ["C:\\x\\y.txt"], "rate": 1e-4}
    (run / "config.json").write_text(json.dumps(settings))
    assert run_view.read_config(run) == {
        "model": {"base": "Edit", "flavour": "edit-v1"},
        "list": ["y.txt"],
        "rate": 1e-4,
    }


def test_samples(tmp_path: Path):
    run, picture = make_run(tmp_path / "mine", []), Image.new("RGB", (8, 8))
    for step in (500, 250):
        save_sample_pictures(
            [GridRow((picture,), picture, picture, picture, "x")], run / "samples" / f"step-{step:06d}"
        )
    (run / "samples" / "step-000750").mkdir()  # its pictures are still being drawn
    (run / "samples" / "step-x").mkdir()
    found = run_view.samples(run)
    assert [each["step"] for each in found] == [250, 500]
    assert found[0]["pairs"] == [{"caption": "x", "label": "", "columns": ["reference-1", "base", "lora", "target"]}]
    assert run_view.picture_name(run, 250, 0, "lora") == "samples/step-000250/0-lora.png"
    for asked in ((250, 1, "lora"), (250, -1, "lora"), (250, 0, "../x"), (251, 0, "lora")):
        assert run_view.picture_name(run, *asked) == ""


def damaged_parts() -> dict[str, Any]:
    """Functions that damage one part of a run folder."""
    texts = [b"", b"[]", b"null", b"5", b'"x"', b"[" * 50_000, b"\xff\xfe", b'{"key": 5}', b'{"step": 1e999}']
    texts += [b'{"key": {}, "result": 5}', b'{"key": {}, "state": [1]}', b'{"key": {}, "samples": [1]}', b"9" * 5000]
    texts += [b'{"step": 3, "loss": ' + b"9" * 400 + b"}", b'{"step": 3, "loss": "x"}', b'{"step": [], "loss": 1}']
    names = ["run.json", "config.json", "metrics.jsonl", "graph.json", "samples/step-000250/index.json"]
    found = {f"{name} is {text[:20]!r}": _written(name, text) for name in names for text in texts}
    for name in (*names[1:], "samples", "checkpoints", "run.lock"):
        found[f"{name} is a folder"] = lambda folder, name=name: (folder / name / "x").mkdir(parents=True)
    for name in ("samples", "samples/step-000250", "checkpoints", "tensorboard"):
        found[f"{name} is a file"] = _written(name, b"x")
    return found


def _written(name: str, data: bytes) -> Any:
    def write(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)

    return write


def test_a_damaged_run_is_listed_and_the_others_too(tmp_path: Path):
    parts = damaged_parts()
    for number, damage in enumerate(parts.values()):
        folder = tmp_path / f"run{number}"
        folder.mkdir()
        damage(folder)
        if not (folder / "run.json").exists():
            (folder / "run.json").write_text(json.dumps({"key": {}, "state": "kept"}))
    make_run(tmp_path / "good", [row(1)], state="finished")
    listed = [run_view.summary(folder) for folder in run_view.run_folders(tmp_path, 500)]
    assert len(listed) == len(parts) + 1
    by_name = {run["run_name"]: run for run in listed}
    assert (by_name["good"]["state"], by_name["good"]["problem"]) == ("finished", "")
    for number, what in enumerate(parts):
        run, folder = by_name[f"run{number}"], tmp_path / f"run{number}"
        assert bool(run["problem"]) == (run["state"] == "damaged"), what
        if what.startswith("run.json") and "samples" not in what:
            assert run["state"] == "damaged" and "run.json" in run["problem"], what
            assert "another name" in run["problem"] and str(tmp_path) not in run["problem"]
        else:
            assert run["state"] in ("kept", "started"), what
        shown = [run, run_view.curve(folder, 10), run_view.read_config(folder), run_view.samples(folder)]
        json.dumps(shown, allow_nan=False)
        assert run_view.picture_name(folder, 250, 0, "lora") == ""


HOLD = """
import sys
from pathlib import Path
from trainer_core.runs.folder import RunFolder
with RunFolder.open(Path(sys.argv[1]), {}) as run:
    print("inside", flush=True)
    sys.stdin.read()
"""


def test_a_run_that_another_process_trains_is_not_interrupted(tmp_path: Path):
    folder = tmp_path / "theirs"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], cwd=REPO, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"inside\n"
            assert run_view.summary(folder)["state"] == "elsewhere"
        finally:
            process.kill()
    assert run_view.summary(folder)["state"] == "started"
    (tmp_path / "mine.txt").write_text("mine")
    (folder / "run.lock").unlink()
    (folder / "run.lock").symlink_to(tmp_path / "mine.txt")
    assert run_view.summary(folder)["state"] == "started"
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_a_look_at_the_lock_does_not_keep_a_training_from_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Many looks at once, and many starts: every start gets the lock, however long a look takes on a busy machine."""
    monkeypatch.setattr(lock, "_LOCK_SECONDS", 300)
    folder, key = tmp_path / "mine", resume_key(TrainConfig(run_dir="mine", encoded="pairs.json"))
    with RunFolder.open(folder, key):
        pass
    stop = threading.Event()

    def look() -> None:
        while not stop.is_set():
            run_view.summary(folder)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(20):
            with RunFolder.open(folder, key) as run:
                assert run.state()["state"] == "started"
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def test_two_pages_that_look_at_once_see_no_training(tmp_path: Path):
    run, found = make_run(tmp_path / "mine", []), []
    (run / "run.lock").touch()

    def look() -> None:
        found.extend(is_in_use(run) for _ in range(1000))

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [False] * 2000
