"""Fixture: a ComfyUI server with a narrow base model and a small dataset."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import place_base, place_pairs


@pytest.fixture(scope="session")
def studio(comfyui: PackServer, tokenizer_dir: Path) -> PackServer:
    """The server that all tests share, with a narrow base model and five pairs."""
    place_base(comfyui, tokenizer_dir)
    place_pairs(comfyui)
    return comfyui
