"""The demo's client: how it reads ComfyUI's answers, and its error messages."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tools import demo
from tools.comfyui import ComfyUI, ComfyUIError


def entry(ending: str, outputs: dict | None = None, **data) -> dict:
    status = {"status_str": "success" if ending == "execution_success" else "error", "messages": [[ending, data]]}
    return {"outputs": outputs or {}, "status": status}


def test_keys_are_counted_from_the_header(tmp_path: Path):
    file = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(1), "b": torch.zeros(2)}, file, metadata={"rank": "4"})
    assert demo.count_keys(file) == 2


def test_the_result_is_found():
    outputs = {"3": {"text": ["x"]}, "5": {demo.RESULT: [{"steps": 4}]}}
    assert demo.result_of(entry("execution_success", outputs)) == {"steps": 4}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (entry("execution_error", node_id="5", node_type="QwenEdit_Train", exception_message="No pairs."), "No pairs"),
        (entry("execution_interrupted", node_id="5"), "interrupted at node 5"),
        (entry("execution_success"), "no node reported"),
    ],
)
def test_failures_are_told_in_words(given: dict, words: str):
    with pytest.raises(ComfyUIError, match=words):
        demo.result_of(given)


def test_reported_files_are_found_by_name(tmp_path: Path):
    file = tmp_path / "output" / "loras" / "run" / "x.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    assert demo.find_file(tmp_path, "run/x.safetensors") == file
    assert demo.find_file(tmp_path, str(file)) == file
    with pytest.raises(ComfyUIError, match=r"y\.safetensors"):
        demo.find_file(tmp_path, "y.safetensors")


def test_progress_is_told_by_tenths(capsys: pytest.CaptureFixture[str]):
    shows = demo.Progress({"5": {"class_type": "X", "inputs": {}, "_meta": {"title": "Train"}}})
    for value in range(101):
        shows({"type": "progress", "data": {"node": "5", "value": value, "max": 100}})
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 11
    assert "Train" in lines[0]
    assert "100/100" in lines[-1]


def test_a_comfyui_that_does_not_start_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "main.py").write_text("raise SystemExit('no such luck')")
    monkeypatch.setenv("COMFYUI_DIR", str(tree))
    with pytest.raises(ComfyUIError, match="no such luck"):
        ComfyUI(tmp_path / "base", log=tmp_path / "log.txt").start()


def test_a_missing_comfyui_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COMFYUI_DIR", str(tmp_path))
    with pytest.raises(ComfyUIError, match="make setup"):
        ComfyUI(tmp_path / "base", log=tmp_path / "log.txt").start()


def test_only_a_former_demo_is_emptied(tmp_path: Path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ComfyUIError, match="other files"):
        demo.prepare(tmp_path)
    assert (tmp_path / "mine.txt").is_file()
