"""A second copy of the pack stays out of ComfyUI, and says where both copies are."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tools.comfyui import REPO


def load(folder: Path, name: str) -> ModuleType:
    """Load a copy of the pack's __init__.py as ComfyUI does."""
    folder.mkdir(exist_ok=True)
    shutil.copy(REPO / "__init__.py", folder)
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def register(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """What ComfyUI knows after it has loaded a copy of the pack."""
    module = ModuleType("copy.nodes.train")
    module.__file__ = str(folder / "nodes" / "train.py")
    comfyui = ModuleType("nodes")
    node = type("TrainLora", (), {"__module__": module.__name__})
    comfyui.NODE_CLASS_MAPPINGS = {"QwenEdit_TrainLora": node}  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, "nodes", comfyui)


def test_the_second_copy_stays_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    first, second = tmp_path / "qwen-edit-trainer", tmp_path / "qwen-edit-trainer-main"
    assert load(first, "first").WEB_DIRECTORY
    register(monkeypatch, first)
    assert load(first, "again").WEB_DIRECTORY, "the same folder may be loaded again"
    with pytest.raises(ImportError, match="installed twice") as caught:
        load(second, "second")
    assert str(first) in str(caught.value) and f"the one in {second} is left out" in str(caught.value)


def test_a_link_to_the_same_copy_is_a_second_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    first, link = tmp_path / "qwen-edit-trainer", tmp_path / "link"
    load(first, "first")
    link.symlink_to(first)
    register(monkeypatch, first)
    spec = importlib.util.spec_from_file_location("link", link / "__init__.py")
    assert spec and spec.loader
    with pytest.raises(ImportError, match="installed twice"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
