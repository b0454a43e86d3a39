"""Precedence on the training node: its widgets, then connected settings, then the preset."""

from __future__ import annotations

import json

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import TRAIN, run_dir, training

pytestmark = pytest.mark.server


def test_connected_settings_win_over_the_preset(studio: PackServer):
    prompt = training("preset", 1, preset="quality")
    for name in ("optimizer_settings", "training_settings"):
        del prompt[TRAIN]["inputs"][name]
    studio.run(prompt)
    config = json.loads((run_dir(studio, "preset") / "config.json").read_text(encoding="utf-8"))
    assert (config["lora"]["lora_rank"], config["lora"]["lora_targets"]) == (4, "attention")
    assert (config["optimizer"]["learning_rate"], config["optimizer"]["lr_warmup_steps"]) == (5e-5, 100)
    assert config["batching"]["gradient_accumulation_steps"] == 4 and config["max_train_steps"] == 1
