"""ComfyUI must answer requests while it trains. benchmarks/server.py measures response times on an idle machine."""

from __future__ import annotations

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.server_waits import percentile, wait_for_steps
from tests.support.training_graph import training, under_way

pytestmark = pytest.mark.server

PATHS = ("/queue", "/qwen_edit_trainer/runs/busy/curve")


def test_answers_while_training(studio: PackServer):
    """The server must answer several requests per training step; if training blocked it, it would answer about one."""
    prompt_id = studio.queue(training("busy", 1_000_000))
    try:
        wait_for_steps(studio, 1)
        assert all(studio.get(path) for path in PATHS)
        steps = [run["step"] for _ in range(100) for run in under_way(studio)]
    finally:
        studio.post("/qwen_edit_trainer/stop", {"run_name": "busy"})
    studio.wait(prompt_id)
    assert len(steps) == 100
    assert len(steps) > len(set(steps)), "no step was seen twice, so answers wait for the end of a step"


def test_percentile():
    assert percentile([float(value) for value in range(1, 101)], 0.95) == 95
    assert percentile([1.0], 0.95) == 1
