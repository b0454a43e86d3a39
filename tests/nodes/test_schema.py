"""The nodes as workflows store them (ids, order of inputs, defaults) and users see them (names, tooltips, help)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from .help_lists import lists, lists_in, with_lists

GOLDEN = Path(__file__).parents[1] / "golden" / "schema.json"
DEPENDS_ON_FOLDERS = {("QwenEdit_LoadModel", "base_model"), ("QwenEdit_SampleEdit", "lora_name")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_SampleEdit", "few_step_lora"), ("QwenEdit_ValidationSettings", "validation_lora")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_AddModelLora", "lora_name")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_ImportSimpleTuner", "base_model")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_LoraSettings", "init_lora"), ("QwenEdit_EditPairs", "data_set")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_TryLora", name) for name in ("run_name", "picture")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_LoadModelFiles", f"{part}_file") for part in ("transformer", "text_encoder", "vae")}
DEPENDS_ON_FOLDERS |= {("QwenEdit_ChooseModel", each) for each in ("model", "text_encoder", "vae")}
SHORT_PATH = {"QwenEdit_ChooseModel", "QwenEdit_EditPairs", "QwenEdit_Train", "QwenEdit_TryLora"}
EXPECTED = {
    *SHORT_PATH,
    "QwenEdit_MoreSettings",
    "QwenEdit_LoadModel",
    "QwenEdit_LoadModelFiles",
    "QwenEdit_PairFolders",
    "QwenEdit_CaptionSettings",
    "QwenEdit_PreviewPairs",
    "QwenEdit_CheckPairs",
    "QwenEdit_PreviewEditWeight",
    "QwenEdit_PairImages",
    "QwenEdit_SizeSettings",
    "QwenEdit_ReferenceSettings",
    "QwenEdit_EncodePairs",
    "QwenEdit_MixPairs",
    "QwenEdit_ImportSimpleTuner",
    "QwenEdit_EncodeImported",
    "QwenEdit_LoraSettings",
    "QwenEdit_MemorySettings",
    "QwenEdit_OptimizerSettings",
    "QwenEdit_TrainingSettings",
    "QwenEdit_ValidationSettings",
    "QwenEdit_RolloutSettings",
    "QwenEdit_PlanMemory",
    "QwenEdit_EmaSettings",
    "QwenEdit_TrainLora",
    "QwenEdit_SampleEdit",
    "QwenEdit_ApplyLora",
    "QwenEdit_PlotLoss",
    "QwenEdit_DraftCaptions",
    "QwenEdit_AddModelLora",
    "QwenEdit_PreservationSettings",
}


def inputs(info: dict[str, Any]) -> list[tuple[str, str, str, dict[str, Any]]]:
    """(required or optional, id, type, options) of each input, in the node's order."""
    return [
        (part, name, spec[0], spec[1] if len(spec) > 1 else {})
        for part in ("required", "optional")
        for name, spec in info["input"].get(part, {}).items()
    ]


def schema_of(name: str, info: dict[str, Any]) -> dict[str, Any]:
    """The part of a node that workflows store or rely on."""
    rows = []
    for part, input_id, kind, options in inputs(info):
        row = {"part": part, "id": input_id, "type": kind}
        if (name, input_id) not in DEPENDS_ON_FOLDERS:
            row |= {key: options[key] for key in ("default", "options", "min", "max") if key in options}
        rows.append(row)
    outputs = [list(pair) for pair in zip(info["output_name"], info["output"], strict=True)]
    return {"inputs": rows, "outputs": outputs, "output_node": info["output_node"]}


def test_schema_is_as_workflows_know_it(our_nodes: dict[str, Any]):
    """Ids must not change, widgets may only be appended. UPDATE_GOLDEN=1 rewrites the file; commit it separately."""
    found = {name: schema_of(name, info) for name, info in sorted(our_nodes.items())}
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_every_node_is_there(our_nodes: dict[str, Any]):
    assert set(our_nodes) == EXPECTED
    short = {name for name, info in our_nodes.items() if info["category"] == "training/qwen edit"}
    assert short == SHORT_PATH
    assert all(our_nodes[name]["category"] == "training/qwen edit/advanced" for name in EXPECTED - SHORT_PATH)


def test_names_and_descriptions(our_nodes: dict[str, Any]):
    display = [info["display_name"] for info in our_nodes.values()]
    assert len(set(display)) == len(display)
    for name, info in our_nodes.items():
        assert info["display_name"] != name
        assert info["description"].endswith("."), name


def test_no_core_node_has_our_display_names(all_nodes: dict[str, Any], our_nodes: dict[str, Any]):
    others = {info["display_name"] for name, info in all_nodes.items() if name not in our_nodes}
    assert others.isdisjoint(info["display_name"] for info in our_nodes.values())


def test_every_socket_is_explained(our_nodes: dict[str, Any]):
    for name, info in our_nodes.items():
        for _, input_id, _, options in inputs(info):
            assert len(options.get("tooltip", "")) > 10, (name, input_id)
            assert options.get("display_name"), (name, input_id)
        assert all(len(tip or "") > 10 for tip in info["output_tooltips"]), name


def test_conditions_name_values_that_menus_have(our_nodes: dict[str, Any]):
    """Otherwise a setting would never be shown, or always."""
    for name, info in our_nodes.items():
        menus = {each: options["options"] for _, each, kind, options in inputs(info) if kind == "COMBO"}
        for _, input_id, _, options in inputs(info):
            for condition in options.get("qwen_edit_used", {}).get("if", ()):
                if condition["setting"] in menus:
                    values = {*condition["equals"], *condition["differs"]}
                    assert values <= set(menus[condition["setting"]]), (name, input_id)


def test_ids_are_unique_between_inputs_and_outputs(our_nodes: dict[str, Any]):
    for name, info in our_nodes.items():
        ids = [input_id for _, input_id, _, _ in inputs(info)]
        outputs = [output.replace(" ", "_") for output in info["output_name"]]
        assert len({*ids, *outputs}) == len(ids) + len(outputs), name


def test_own_types_have_our_prefix(our_nodes: dict[str, Any]):
    core = {"IMAGE", "STRING", "INT", "FLOAT", "BOOLEAN", "COMBO", "MODEL", "CLIP", "VAE", "LORA_MODEL", "LOSS_MAP"}
    for name, info in our_nodes.items():
        kinds = {kind for _, _, kind, _ in inputs(info)} | set(info["output"])
        assert all(kind.startswith("QWEN_EDIT_") for kind in kinds - core), name


def test_core_sockets_at_both_ends(our_nodes: dict[str, Any]):
    made = {kind for info in our_nodes.values() for kind in info["output"]}
    taken = {kind for info in our_nodes.values() for _, _, kind, _ in inputs(info)}
    assert made >= {"LORA_MODEL", "LOSS_MAP", "IMAGE", "STRING", "MODEL"}
    assert taken >= {"LOSS_MAP", "IMAGE", "MODEL", "CLIP", "VAE"}


def test_training_runs_once_per_node_and_shows_itself(our_nodes: dict[str, Any]):
    assert our_nodes["QwenEdit_TrainLora"]["output_node"]
    assert our_nodes["QwenEdit_PreviewPairs"]["output_node"]
    assert our_nodes["QwenEdit_PlotLoss"]["output_node"]


def test_help_pages(our_nodes: dict[str, Any], repo: Path):
    """Every node has a page, and every page belongs to a node."""
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (repo / "web" / "docs").glob("*.md")}
    assert set(pages) == set(our_nodes)
    for name, page in pages.items():
        assert page.startswith(f"# {our_nodes[name]['display_name']}\n")
        for heading in ("## Inputs", "## Outputs", "## Typical values", "## Example", "## Pitfalls"):
            assert f"\n{heading}\n" in page, (name, heading)


def test_help_pages_say_what_the_nodes_say(our_nodes: dict[str, Any], repo: Path):
    """Help pages list the tooltips, defaults and limits of the nodes. UPDATE_GOLDEN=1 rewrites the lists."""
    for name, info in our_nodes.items():
        path = repo / "web" / "docs" / f"{name}.md"
        page = path.read_text(encoding="utf-8")
        if os.environ.get("UPDATE_GOLDEN"):
            page = with_lists(page, info)
            path.write_text(page, encoding="utf-8")
        assert lists_in(page) == lists(info)


def test_help_pages_lie_where_comfyui_looks(repo: Path):
    """ComfyUI serves WEB_DIRECTORY, and its page requests docs/<node id>.md from it."""
    root = (repo / "__init__.py").read_text(encoding="utf-8")
    assert re.search(r'^WEB_DIRECTORY = "\./web"$', root, re.MULTILINE)
    assert not re.search(
        r"^NODE_CLASS_MAPPINGS\b", root, re.MULTILINE
    )  # with it, ComfyUI would not call comfy_entrypoint
