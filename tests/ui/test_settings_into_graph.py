"""Copying a run's settings into the graph: its nodes must run and give the settings of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.browser_page import ComfyPage
from tests.support.comfyui_server import PackServer
from tests.support.training_graph import helper
from trainer_core.config import EmaConfig, LoraConfig, MemoryConfig, OptimizerConfig, TrainConfig, resume_key
from trainer_core.runs.folder import RunFolder
from trainer_core.settings import to_json

from .conftest import OpenPage

pytestmark = pytest.mark.server

LISTED = "mine/mine.safetensors"
PATTERNS = ("0 = 2", r".*\.attn\.to_q = 3")


def place_run(runs_dir: Path, name: str, **sections: Any) -> str:
    """Create a run folder with the settings, as a training does at its start; returns its name."""
    config = TrainConfig(run_dir=str(runs_dir / name), encoded="-", seed=5, **sections)
    with RunFolder.open(runs_dir / name, resume_key(config)) as folder:
        folder.write_config(to_json(config))
    return name


def put_into_graph(page: ComfyPage, run_name: str) -> None:
    """Press the button and wait for the confirmation."""
    page.open_panel(run_name)
    page.panel.get_by_role("button", name="Settings into graph").click()
    page.page.get_by_text("Settings copied", exact=True).wait_for()


def settings_nodes(page: ComfyPage) -> dict[str, dict[str, Any]]:
    """The settings nodes of the prompt that Run would send."""
    prompt = page.page.evaluate("async () => (await app.graphToPrompt()).output")
    return {key: node for key, node in prompt.items() if node["class_type"].endswith("Settings")}


def values_made(server: PackServer, nodes: dict[str, dict[str, Any]]) -> list[str]:
    """Run the nodes on the server; returns each output as text."""
    asked = {f"told{key}": helper("SaveText", value=[key, 0]) for key in nodes}
    outputs = server.run({**nodes, **asked})
    return [outputs[key]["text"][0] for key in asked]


@pytest.fixture(scope="module")
def lora_file(demo_server: PackServer) -> Path:
    """An empty file that ComfyUI lists as a LoRA, in a subfolder."""
    path = demo_server.base / "models" / "loras" / LISTED
    path.parent.mkdir(parents=True)
    path.touch()
    return path


def test_the_nodes_give_the_runs_settings(
    lora_file: Path, runs_dir: Path, open_page: OpenPage, demo_server: PackServer
):
    lora = LoraConfig(lora_rank=4, rank_pattern=PATTERNS, init_lora=str(lora_file))
    optimizer = OptimizerConfig(learning_rate=3e-5)
    name = place_run(runs_dir, "started from a LoRA", lora=lora, optimizer=optimizer)
    page = open_page()
    page.page.evaluate("() => app.graph.clear()")
    put_into_graph(page, name)
    assert page.widgets("LoraSettings")["init_lora"] == LISTED
    made = values_made(demo_server, settings_nodes(page))
    assert sorted(made) == sorted([str(lora), str(optimizer)])  # no nodes for default settings, such as EMA off


def test_nodes_that_are_there(lora_file: Path, runs_dir: Path, open_page: OpenPage, demo_server: PackServer):
    memory, ema = MemoryConfig(blocks_to_stream=3), EmaConfig(use_ema=True, ema_decay=0.99)
    name = place_run(runs_dir, "with an average", memory=memory, ema=ema)
    page = open_page("nodes 2.0")
    page.open_every_setting()
    page.set_widgets("TrainLora", preset="24gb")
    page.set_widgets("LoraSettings", init_lora=LISTED, rank_pattern="\n".join(PATTERNS))
    put_into_graph(page, name)
    assert (page.widgets("TrainLora")["preset"], page.widgets("TrainLora")["seed"]) == ("none", 5)
    made = values_made(demo_server, settings_nodes(page))
    assert {str(LoraConfig()), str(memory), str(ema)} <= set(made)


@pytest.mark.parametrize("saved", [True, False])
def test_an_older_graph_keeps_its_toggle(saved: bool, open_page: OpenPage, demo_server: PackServer):
    """compile_blocks was a toggle. ComfyUI refuses choices that a combo does not list."""
    page = open_page()
    page.page.evaluate(
        """async (saved) => {
            app.graph.clear();
            app.graph.add(LiteGraph.createNode("QwenEdit_MemorySettings"));
            const graph = app.graph.serialize();
            graph.nodes[0].widgets_values = ["manual", 40, false, 0, 2, saved, 0];
            await app.loadGraphData(graph);
        }""",
        saved,
    )
    assert page.widgets("MemorySettings")["compile_blocks"] == ("on" if saved else "off")
    assert page.missing() == []
    memory = MemoryConfig(memory="manual", gradient_checkpointing_blocks=40, compile_blocks="on" if saved else "off")
    assert values_made(demo_server, settings_nodes(page)) == [str(memory)]


def test_an_older_run_keeps_its_toggle(runs_dir: Path, open_page: OpenPage):
    name = place_run(runs_dir, "compiled", memory=MemoryConfig())
    file = runs_dir / name / "config.json"
    file.write_text(file.read_text(encoding="utf-8").replace('"compile_blocks": "auto"', '"compile_blocks": true'))
    page = open_page()
    page.page.evaluate("() => app.graph.clear()")
    put_into_graph(page, name)
    assert page.widgets("MemorySettings")["compile_blocks"] == "on"


def test_a_lora_that_is_not_listed_is_named(runs_dir: Path, open_page: OpenPage, tmp_path: Path):
    lora = LoraConfig(init_lora=str(tmp_path / "gone.safetensors"))
    page = open_page()
    page.page.evaluate("() => app.graph.clear()")
    put_into_graph(page, place_run(runs_dir, "from a lost LoRA", lora=lora))
    page.page.get_by_text("init_lora gone.safetensors").wait_for()
    assert page.widgets("LoraSettings")["init_lora"] == "none"
