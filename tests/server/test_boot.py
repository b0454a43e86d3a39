"""A real ComfyUI must load the pack under any folder name and list its nodes."""

from __future__ import annotations

import re

import pytest

from tests.support.comfyui_server import ODD_NAME, TEST_NODES, PackServer
from tools.comfyui import REPO, ComfyUIError, failure, status_of

pytestmark = pytest.mark.server


def log_text(server: PackServer) -> str:
    return server.log.read_text(encoding="utf-8", errors="replace")


def test_the_pack_is_loaded_without_complaint(comfyui: PackServer):
    text = log_text(comfyui)
    assert not re.search(r"IMPORT FAILED.*custom_nodes", text)
    assert "Error while calling comfy_entrypoint" not in text
    assert {ODD_NAME, TEST_NODES} <= set(re.findall(r"seconds: .*custom_nodes/(.+)", text))


def test_object_info_has_our_nodes(comfyui: PackServer):
    nodes = comfyui.our_nodes()
    assert len(nodes) >= 8
    assert any("Train" in name for name in nodes)
    for name, info in nodes.items():
        assert info["display_name"], name
        assert info["description"], name


def test_help_pages_and_scripts_are_served_once(comfyui: PackServer):
    served = [path for path in comfyui.get("/extensions") if "Qwen-Edit" in path or "qwen-edit" in path]
    scripts = (path.relative_to(REPO / "web").as_posix() for path in (REPO / "web").rglob("*.js"))
    assert sorted(path.split("/", 3)[-1] for path in served) == sorted(scripts)  # after /extensions/<pack>/


def test_helper_nodes_run_and_their_events_arrive(comfyui: PackServer):
    prompt = {"1": {"class_type": "QetTest_GlobalState", "inputs": {}}}
    prompt_id = comfyui.queue(prompt)
    entry = comfyui.wait(prompt_id)
    assert status_of(entry) == "execution_success", failure(entry)
    assert entry["outputs"]["1"]["state"][0]["inference"] is True
    comfyui.wait_for_event(lambda event: event["type"] == "execution_success")
    assert comfyui.events_of(prompt_id, "execution_start")


def test_an_invalid_prompt_is_refused_in_words(comfyui: PackServer):
    with pytest.raises(ComfyUIError, match="QwenEdit_NoSuchNode"):
        comfyui.queue({"1": {"class_type": "QwenEdit_NoSuchNode", "inputs": {}}})
