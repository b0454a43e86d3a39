"""A capture of CUDA graphs that ends the program is noticed at the next start."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.comfyui import REPO
from trainer_core.memory.capture_guard import noted_capture, unfinished_capture


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    return tmp_path / "caches"


def test_a_capture_that_ends_leaves_nothing_behind() -> None:
    with noted_capture():
        pass
    with pytest.raises(ValueError, match="fails"), noted_capture():
        raise ValueError("fails")
    assert unfinished_capture() is None


def test_a_capture_that_ends_the_program_is_noticed_until_its_file_is_deleted() -> None:
    code = """
import os
from trainer_core.memory.capture_guard import noted_capture
with noted_capture():
    os.abort()
"""
    subprocess.run([sys.executable, "-c", code], cwd=REPO, env=dict(os.environ), check=False, capture_output=True)
    note = unfinished_capture()
    assert note is not None and note.is_file()
    note.unlink()
    assert unfinished_capture() is None


def test_another_process_that_captures_right_now_is_no_fault() -> None:
    with noted_capture():
        assert unfinished_capture() is None


def test_without_a_folder_captures_go_on(caches: Path) -> None:
    caches.write_text("a file in its place")
    with noted_capture():
        pass
    assert unfinished_capture() is None
