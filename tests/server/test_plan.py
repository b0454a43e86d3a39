"""The planning node takes the training node's inputs and must plan the same training."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import EMA, ENCODE, LOAD, MEMORY, Prompt, encoding, ours, place_pairs, settings

pytestmark = pytest.mark.server


def planned(server: PackServer, more: Prompt | None = None, **inputs: Any) -> str:
    """The text of the plan for a training on five pairs."""
    plan = ours("PlanMemory", model=[LOAD, 0], encoded=[ENCODE, 0], card_gib=8.0, **inputs)
    return server.run({**encoding(), **(more or {}), "plan": plan})["plan"]["text"][0]


def test_settings_of_the_training_node_count(studio: PackServer):
    plain = planned(studio)
    assert "running average" not in plain
    assert "rank 16 on image-attention" in plain
    assert "running average" in planned(studio, {"ema": EMA}, ema_settings=["ema", 0])
    assert "rank 32 on attention-mlp" in planned(studio, preset="quality")


@pytest.mark.parametrize(("saved", "said"), [(False, "off"), (True, "on"), ("off", "off")])
def test_a_toggle_of_an_older_graph_counts(studio: PackServer, saved: object, said: str):
    """compile_blocks was true or false in graphs and prompts before it had auto."""
    node = {"memory": ours("MemorySettings", **{**MEMORY, "memory": "manual", "compile_blocks": saved})}
    assert f"compile_blocks {said}" in planned(studio, node, memory_settings=["memory", 0])


def test_settings_that_auto_does_not_use_are_named(studio: PackServer):
    node = {"memory": ours("MemorySettings", **{**MEMORY, "blocks_to_stream": 20})}
    text = planned(studio, node, memory_settings=["memory", 0])
    assert text.endswith("Not used, because memory is auto: blocks_to_stream 20. Set memory to manual to use it.")


def test_the_dataset_that_is_validated_on_counts(studio: PackServer):
    wide = place_pairs(studio, "wide", 2, sizes=((192, 96),))
    second = {"second pairs": dict(encoding(wide)["pair"]), "second": dict(encoding(wide)[ENCODE])}
    second["second"]["inputs"] = {
        **second["second"]["inputs"],
        "dataset": ["second pairs", 0],
        "resolution": 160,
        "num_eval_images": 1,
    }
    assert planned(studio, second, validation_encoded=["second", 0]) != planned(studio)


def test_pictures_that_will_not_be_measured_are_told(studio: PackServer):
    node = dict(settings(validate=1, draw=1)["validation"])
    node["inputs"] = {**node["inputs"], "validation_resolution": "64x128"}
    text = planned(studio, {"validation": node}, validation_settings=["validation", 0])
    assert "1 of 1 validation pictures can't be compared with their targets" in text
    assert "a picture is 64 x 128, its target 96 x 96" in text
    assert "compared" not in planned(studio)
