"""In a real ComfyUI, the node drafts captions for the pairs of its folders that have none."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.narrow import make_pairs
from tests.support.writers import make_writing_base
from tools.comfyui import ComfyUIError
from trainer_core.config import ModelConfig

BASE, PAIRS = "writing", "to_caption"


@pytest.fixture(scope="module")
def server(comfyui: PackServer, model: ModelConfig) -> Iterator[PackServer]:
    """The server, with a base model that can write and three pairs. 000 has a caption."""
    base = comfyui.base / "models" / "diffusers" / BASE
    make_writing_base(base, model, shouts=True)
    make_pairs(comfyui.input / PAIRS, 3)
    for key in ("001", "002"):
        caption(comfyui, key).unlink()
    yield comfyui
    for folder in (base, comfyui.input / PAIRS):  # other tests use the server too
        shutil.rmtree(folder)


def caption(server: PackServer, key: str) -> Path:
    return server.input / PAIRS / "target" / f"{key}.txt"


def prompt(base: str = BASE, **widgets: Any) -> dict[str, Any]:
    folders = {"target_folder": f"{PAIRS}/target", "reference_folder_1": f"{PAIRS}/reference_1"}
    settings = {"hint": "", "max_tokens": 8, "language": "English"}
    load = {"base_model": base, "flavour": "edit-v1", "base_model_precision": "none", "mixed_precision": "no"}
    return {
        "load": {"class_type": "QwenEdit_LoadModel", "inputs": load},
        "draft": {
            "class_type": "QwenEdit_DraftCaptions",
            "inputs": {"model": ["load", 0], **folders, **settings, **widgets},
        },
    }


def test_missing_captions_are_drafted_and_others_left(server: PackServer) -> None:
    before = caption(server, "000").read_text()
    (report,) = server.run(prompt())["draft"]["text"]
    assert report.startswith("2 captions drafted.") and "  - 002: !!!!!!!!" in report and "1 (000)" in report
    assert [caption(server, key).read_text() for key in ("000", "001", "002")] == [before, *["!!!!!!!!\n"] * 2]
    (again,) = server.run(prompt())["draft"]["text"]
    assert again.startswith("No pair lacks a caption, so nothing was loaded or written.")
    caption(server, "001").unlink()
    (after,) = server.run(prompt())["draft"]["text"]
    assert after.startswith("1 caption drafted."), "the node runs again when a caption is gone"


def test_what_it_refuses(server: PackServer) -> None:
    with pytest.raises(ComfyUIError, match=r"reference_folder_1 is '\.\./x', which is not a folder name"):
        server.run(prompt(reference_folder_1="../x"))
    with pytest.raises(ComfyUIError, match=r"hint must be a text without <\|"):
        server.run(prompt(hint="<|im_end|>"))
    caption(server, "001").unlink()
    with pytest.raises(ComfyUIError, match="The demo model can't write captions") as caught:
        server.run(prompt(base="demo (embedded)"))
    assert not caption(server, "001").exists() and str(server.base) not in str(caught.value).split("\n")[0]
