"""Templates and blueprints are what tools/templates.py writes, and open without missing nodes or values."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tools.comfyui import REPO, comfyui_dir, install_pack
from tools.template_graphs import BLUEPRINTS, TEMPLATES, Blueprint
from tools.templates import BLUEPRINT_FOLDER, file_of, files_of

from .conftest import read_json
from .ui_to_api import NOTES, known_to, to_prompt, widgets_of

FOLDER = REPO / "workflows"
TWINS = {template.title: template.name for template in TEMPLATES}  # file of the API prompt by title
NEWER = {"reference_latents_method": "index_timestep_zero"}  # choices since ComfyUI 0.8, for 2511
OUR_VERSION = re.search(r'^version = "(.+)"', (REPO / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)[1]


@pytest.fixture(params=TWINS)
def name(request: pytest.FixtureRequest) -> str:
    """Title of a template."""
    return request.param


@pytest.fixture
def graph(name: str) -> dict[str, Any]:
    """The template as ComfyUI's page saves it."""
    return read_json(FOLDER / f"{name}.json")


def test_every_file_belongs_to_a_template():
    assert {path.stem for path in FOLDER.glob("*.json")} == set(TWINS)
    assert {path.stem for path in FOLDER.glob("*.jpg")} == set(TWINS)
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == set(TWINS.values())


def test_the_files_are_written_from_the_graphs(name: str, graph: dict[str, Any], all_nodes: dict[str, Any]):
    """`make templates` would change nothing, apart from what a newer ComfyUI adds to its own nodes."""
    known = {node["type"]: known_to(node, all_nodes) for node in graph["nodes"] if node["type"] not in NOTES}
    template = next(each for each in TEMPLATES if each.title == name)
    for path, value in files_of(template, known).items():
        assert read_json(FOLDER / path) == value, path


def test_the_page_opens_the_templates_that_use_a_lora():
    script = (REPO / "web" / "trainer" / "graph.js").read_text(encoding="utf-8")
    named = re.findall(r': "(Use [^"]+)"', re.search(r"USE_TEMPLATES = \{(.+?)\}", script, re.DOTALL)[1])
    assert sorted(f"Qwen edit LoRA - {name}" for name in named) == sorted(
        title for title in TWINS if " - Use " in title
    )


def test_titles_are_found_by_what_people_search(name: str):
    assert re.fullmatch(r"Qwen edit LoRA - [A-Za-z0-9 -]+", name)  # ComfyUI searches the file name; no odd characters


@pytest.mark.parametrize("searched", ["qwen", "train lora", "edit lora"])
def test_a_training_for_each_release_is_found(searched: str):
    """Frontend 1.32.9 looks near the start of the name, for words that follow each other."""
    assert sum(searched in title.lower()[:40] for title in TWINS) >= 3


def test_known_classes_and_values(graph: dict[str, Any], all_nodes: dict[str, Any]):
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        info = known_to(node, all_nodes)
        assert len(node["widgets_values"]) == sum(count for _, count in widgets_of(info)), node["type"]
        assert [(output["name"], output["type"]) for output in node["outputs"]] == [
            *zip(info["output_name"], info["output"], strict=True)
        ]
        named = [entry["name"] for entry in node["inputs"]]
        specs = {**info["input"].get("required", {}), **info["input"].get("optional", {})}
        assert sorted(named) == sorted(specs)
        linked = {entry["name"] for entry in node["inputs"] if entry["link"] is not None}
        widgets = {widget for widget, _ in widgets_of(info)}
        assert set(info["input"].get("required", {})) <= linked | widgets, node["type"]


def test_links_are_consistent(graph: dict[str, Any]):
    nodes = {node["id"]: node for node in graph["nodes"]}
    assert len(nodes) == len(graph["nodes"]) == graph["last_node_id"]
    seen = set()
    for link, source, source_slot, target, target_slot, kind in graph["links"]:
        assert link in nodes[source]["outputs"][source_slot]["links"]
        assert nodes[source]["outputs"][source_slot]["type"] == kind
        assert nodes[target]["inputs"][target_slot]["link"] == link
        assert nodes[target]["inputs"][target_slot]["type"] in (kind, "*")
        seen.add(link)
    ends = [entry["link"] for node in graph["nodes"] for entry in node["inputs"] if entry["link"] is not None]
    starts = [link for node in graph["nodes"] for output in node["outputs"] for link in output["links"] or []]
    assert sorted(ends) == sorted(starts) == sorted(seen)


def test_flat_and_for_old_pages(graph: dict[str, Any]):
    assert graph["version"] == 0.4
    assert "definitions" not in graph  # no subgraphs
    assert {"id", "nodes", "links", "groups", "last_link_id"} <= set(graph)


def test_api_twin(name: str, graph: dict[str, Any], all_nodes: dict[str, Any]):
    twin = read_json(FOLDER / "api" / f"{TWINS[name]}.json")
    for node in twin.values():
        assert node.pop("_meta")["title"]
    assert twin == to_prompt(graph, all_nodes)


def test_values_are_allowed(name: str, all_nodes: dict[str, Any]):
    """Each choice exists (except files that the user downloads), and each number is within its range."""
    for node in read_json(FOLDER / "api" / f"{TWINS[name]}.json").values():
        info = all_nodes[node["class_type"]]["input"]
        specs = {**info.get("required", {}), **info.get("optional", {})}
        for input_id, value in node["inputs"].items():
            kind, options = specs[input_id][0], specs[input_id][1] if len(specs[input_id]) > 1 else {}
            choices = kind if isinstance(kind, list) else options.get("options")
            file = isinstance(value, str) and value.endswith((".safetensors", ".png"))
            placed = file or input_id in ("base_model", "data_set") or NEWER.get(input_id) == value
            if isinstance(value, list) or (choices is not None and placed):
                continue
            if choices is not None:
                assert value in choices, (node["class_type"], input_id)
            elif kind in ("INT", "FLOAT"):
                assert options["min"] <= value <= options["max"], (node["class_type"], input_id)


def test_pictures_are_found_by_every_page(graph: dict[str, Any]):
    """Frontends since 1.49 or earlier report images that LoadImage doesn't list as missing; it lists no subfolders."""
    named = [node["widgets_values"][0] for node in graph["nodes"] if node["type"] == "LoadImage"]
    assert all("/" not in name for name in named)


def test_nothing_private(name: str):
    for path in (FOLDER / f"{name}.json", FOLDER / "api" / f"{TWINS[name]}.json"):
        for text in strings(read_json(path)):
            assert not re.match(r"[A-Za-z]:[\\/]|/|~|\\\\", text), text
            assert not re.search(r"/(home|root|Users|work|tmp)/", text), text


def test_notes_and_downloads(name: str, graph: dict[str, Any]):
    notes = " ".join(node["widgets_values"][0] for node in graph["nodes"] if node["type"] in NOTES)
    assert len(notes) > 300
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        ours = node["type"].startswith("QwenEdit_")
        assert node["properties"]["cnr_id"] == ("qwen-edit-trainer" if ours else "comfy-core")
        assert not ours or node["properties"]["ver"] == OUR_VERSION
        if node["type"] in ("UNETLoader", "CLIPLoader", "VAELoader"):
            (model,) = node["properties"]["models"]
            assert model["name"] == node["widgets_values"][0]
            assert model["url"].startswith("https://huggingface.co/")
            assert model["url"].endswith(model["name"])
            assert model["directory"]
    if " Train " in name:
        assert "https://huggingface.co/Qwen/" in notes


def test_thumbnail(name: str):
    with Image.open(FOLDER / f"{name}.jpg") as picture:
        assert picture.format == "JPEG"
        assert 320 <= picture.width <= 1280
    assert (FOLDER / f"{name}.jpg").stat().st_size < 200_000


def test_the_demo_needs_nothing_but_what_ships():
    prompt = {node["class_type"]: node["inputs"] for node in read_json(FOLDER / "api" / "demo.json").values()}
    short = {"QwenEdit_ChooseModel", "QwenEdit_EditPairs", "QwenEdit_Train"}
    assert short <= set(prompt) <= {*short, "QwenEdit_TryLora", "QwenEdit_PreviewPairs"}
    assert prompt["QwenEdit_ChooseModel"]["model"] == prompt["QwenEdit_EditPairs"]["data_set"] == "demo (embedded)"
    assert (prompt["QwenEdit_Train"]["preset"], prompt["QwenEdit_Train"]["max_train_steps"]) == ("automatic", 0)


def test_templates_are_published(comfyui: Any, tmp_path: Path):
    pack = install_pack(tmp_path)
    assert {path.stem for path in (pack / "workflows").glob("*.json")} == set(TWINS)
    listed = comfyui.get("/api/workflow_templates")
    assert any(set(TWINS) <= set(templates) for templates in listed.values())


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda each: each.title)
def test_blueprints_are_written_from_the_graphs(blueprint: Blueprint, all_nodes: dict[str, Any]):
    """A file with an error gives every user an error message when ComfyUI's page loads."""
    text = (BLUEPRINT_FOLDER / f"{blueprint.title}.json").read_text(encoding="utf-8")
    graph = json.loads(text)
    assert text.isascii()  # ComfyUI reads it in the encoding of the system
    assert graph == file_of(blueprint, all_nodes)
    (node,), (subgraph,) = graph["nodes"], graph["definitions"]["subgraphs"]
    assert node["type"] == subgraph["id"]
    assert len(node["widgets_values"]) == len({entry["name"] for entry in node["inputs"]}) == len(blueprint.app_inputs)
    inside = {each["id"]: each for each in subgraph["nodes"]}
    for link in subgraph["links"]:
        starts = inside[link["origin_id"]]["outputs"] if link["origin_id"] in inside else subgraph["inputs"]
        ends = inside[link["target_id"]]["inputs"] if link["target_id"] in inside else subgraph["outputs"]
        start, end = starts[link["origin_slot"]], ends[link["target_slot"]]
        assert start["type"] == end["type"] == link["type"]
        assert link["id"] in start.get("links", start.get("linkIds"))
        assert link["id"] in [end.get("link"), *end.get("linkIds", [])]


def test_blueprints_are_published(comfyui: Any):
    """ComfyUI 0.3.64 does not know blueprints."""
    assert {path.stem for path in (comfyui.pack / "subgraphs").iterdir()} == {each.title for each in BLUEPRINTS}
    if (comfyui_dir() / "app" / "subgraph_manager.py").is_file():
        listed = comfyui.get("/global_subgraphs").values()
        assert {each.title for each in BLUEPRINTS} <= {each["name"] for each in listed}


def strings(value: Any) -> list[str]:
    """All strings in a JSON value."""
    if isinstance(value, str):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
    return [text for item in items for text in strings(item)]
