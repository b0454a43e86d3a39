"""Progress messages for the page, and the graph saved in a run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer_core.events import StepReport


def report(step: int, **more: Any) -> StepReport:
    values = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "loss_by_sigma": {}, "seconds": 2.0, **more}
    return StepReport(step=step, num_steps=1000, **values)


@pytest.fixture
def sent() -> list[dict[str, Any]]:
    return []


@pytest.fixture
def messages(pack_module, sent):
    with pack_module("active_runs").active_run("mine", "7") as run:
        yield pack_module("active_runs").LiveMessages(run, lambda _, values: sent.append(values))


def test_a_message_says_how_the_run_stands(messages, sent):
    messages.step(report(10))
    (message,) = sent
    assert (message["run_name"], message["node_id"], message["active"]) == ("mine", "7", True)
    assert (message["step"], message["seconds_per_step"], message["seconds_left"]) == (10, 2.0, 1980.0)
    assert [point["step"] for point in message["points"]] == [10]
    json.dumps(message, allow_nan=False)


@pytest.mark.parametrize("name", ["validation_loss", "ema_validation_loss"])
def test_not_more_often_than_pages_can_show(name, messages, sent, pack_module, monkeypatch: pytest.MonkeyPatch):
    now = [0.0]
    monkeypatch.setattr(pack_module("active_runs").time, "monotonic", lambda: now[0])
    for step in range(1, 1001):
        now[0] += 0.001
        messages.step(report(step, **{name: 0.5 if step == 777 else None}))
    assert len(sent) <= 5
    assert all(len(message["points"]) <= 201 for message in sent)
    assert [point["step"] for message in sent for point in message["points"] if name in point] == [777]


def test_pictures_and_phases(messages, sent):
    messages.phase("Loading the model: 1 of 2")
    messages.samples(3)
    assert sent[0]["phase"] == "Loading the model: 1 of 2"
    assert sent[1]["samples"] == 3
    assert sent[1]["points"] == []


def test_the_kept_graph_goes_on_with_this_run(pack_module, tmp_path: Path):
    graph_file, run = pack_module("graph_file"), tmp_path / "mine-2"
    run.mkdir()
    inputs = {"run_name": ["value", 0], "if_run_exists": "new run", "seed": 5}
    prompt = {"7": {"class_type": "QwenEdit_TrainLora", "inputs": inputs}}
    graph_file.keep_graph(run, "7", prompt, {"workflow": {"nodes": []}})
    found = graph_file.graph_to_continue(run)
    assert found["workflow"] == {"nodes": []}
    wanted = {"run_name": "mine-2", "if_run_exists": "continue a kept run", "seed": 5}
    assert found["prompt"]["7"]["inputs"] == wanted


@pytest.mark.parametrize("prompt", [None, [], {}, {"8": {}}])
def test_without_a_graph_none_is_kept(prompt: object, pack_module, tmp_path: Path):
    pack_module("graph_file").keep_graph(tmp_path, "7", prompt, None)
    assert list(tmp_path.iterdir()) == []
    assert pack_module("graph_file").graph_to_continue(tmp_path) == {}


@pytest.mark.parametrize(
    "graph", [[], {"prompt": []}, {"prompt": {"7": 1}, "node_id": "7"}, {"prompt": {}, "node_id": []}]
)
def test_a_damaged_graph_is_none(graph: object, pack_module, tmp_path: Path):
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    assert pack_module("graph_file").graph_to_continue(tmp_path) == {}
