"""Fixtures: the nodes as a running ComfyUI lists them, and modules of `nodes/` that need no ComfyUI."""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer

PARENT = "qwen_edit_pack"  # ComfyUI too imports the pack under another name


@pytest.fixture(scope="session")
def all_nodes(comfyui: PackServer) -> dict[str, Any]:
    """/object_info of a ComfyUI without runs: node id -> description of the node. Other tests use the server too."""
    found = comfyui.get("/object_info")
    found["QwenEdit_TryLora"]["input"]["required"]["run_name"][1]["options"] = ["none found"]
    return found


@pytest.fixture(scope="session")
def our_nodes(all_nodes: dict[str, Any]) -> dict[str, Any]:
    """This pack's part of /object_info."""
    return {name: info for name, info in all_nodes.items() if name.startswith("QwenEdit_")}


@pytest.fixture(scope="session")
def pack_module(repo: Path) -> Callable[[str], types.ModuleType]:
    """Imports a module of `nodes/` that needs no ComfyUI."""
    parent = types.ModuleType(PARENT)
    parent.__path__ = [str(repo)]
    sys.modules.setdefault(PARENT, parent)
    return lambda name: importlib.import_module(f"{PARENT}.nodes.{name}")


def read_json(path: Path) -> Any:
    """The parsed JSON file."""
    return json.loads(path.read_text(encoding="utf-8"))
