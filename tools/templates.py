"""Writes workflows/ and subgraphs/ from the graphs in tools/template_graphs/ (`make templates`).

A template becomes two files: `workflows/<title>.json`, as ComfyUI's page saves it, and `workflows/api/<name>.json`, the
prompt that the page would queue. Both come from one description, so they can't differ. A blueprint becomes
`subgraphs/<title>.json`, as ComfyUI's page publishes a subgraph. Inputs that a description leaves out get their
defaults. A test checks that the files are current.
"""

from __future__ import annotations

import json
import re
import sys
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.comfyui import PACK_NAME, REPO, all_nodes
from tools.template_graphs import BLUEPRINTS, TEMPLATES, Blueprint, Node, Template

FOLDER = REPO / "workflows"
BLUEPRINT_FOLDER = REPO / "subgraphs"  # the name that ComfyUI looks for
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
NOTE = "MarkdownNote"
_GAP, _COLUMN_GAP, _TITLE = 40, 60, 30  # pixels: between nodes, between columns, and the height of a node's title
_OPTIONAL = 7  # the shape of an optional socket in LiteGraph
_INPUTS, _OUTPUTS = -10, -20  # ids that LiteGraph gives to the two ends of a subgraph
_LINK = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")  # of a link in a subgraph
_VERSION = re.compile(r'^version = "(.+)"', re.MULTILINE)

Info = dict[str, Any]


def files_of(template: Template, all_nodes: dict[str, Info]) -> dict[Path, dict[str, Any]]:
    """The template's two files: path below `workflows/` and content. `all_nodes`: the answer of /object_info."""
    numbers = {node.key: number for number, node in enumerate(template.nodes(), start=1)}
    return {
        Path(f"{template.title}.json"): _graph(template, numbers, all_nodes),
        Path("api", f"{template.name}.json"): _prompt(template, numbers, all_nodes),
    }


def _prompt(template: Template, numbers: dict[str, int], all_nodes: dict[str, Info]) -> dict[str, Any]:
    prompt: dict[str, Any] = {}
    for node in template.nodes():
        if node.kind == NOTE:
            continue
        info = all_nodes[node.kind]
        inputs = {name: node.values.get(name, _default(spec)) for name, spec in _widgets(info)}
        for name, (source, output) in node.links.items():
            inputs[name] = [str(numbers[source]), _output_index(all_nodes[template.kind_of(source)], output)]
        title = node.title or info["display_name"] or node.kind
        prompt[str(numbers[node.key])] = {"class_type": node.kind, "inputs": inputs, "_meta": {"title": title}}
    return prompt


def _graph(template: Template, numbers: dict[str, int], all_nodes: dict[str, Info]) -> dict[str, Any]:
    nodes, links = [], list[list[Any]]()
    for node in template.nodes():
        for name, (source, output) in node.links.items():
            from_info = all_nodes[template.kind_of(source)]
            index = _output_index(from_info, output)
            slot = [entry for entry, _ in _inputs(all_nodes[node.kind])].index(name)
            links.append([len(links) + 1, numbers[source], index, numbers[node.key], slot, from_info["output"][index]])
    places = _places(template)
    for order, node in enumerate(template.nodes()):
        x, y = places[node.key]
        saved: dict[str, Any] = {"id": numbers[node.key], "type": node.kind, "pos": [x, y], "size": [*node.size]}
        saved |= {"flags": {}, "order": order, "mode": 0}
        if node.title:
            saved["title"] = node.title
        saved |= _saved_note(node) if node.kind == NOTE else _saved_node(node, numbers, links, all_nodes[node.kind])
        nodes.append(saved)
    return {
        "id": _uuid(template.name),
        "revision": 0,
        "last_node_id": len(nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": [],
        "config": {},
        **({"models": [dict(model) for model in template.models]} if template.models else {}),
        "extra": {"ds": {"scale": template.scale, "offset": [110, 190]}, **_app(template, numbers)},
        "version": 0.4,
    }


def file_of(blueprint: Blueprint, all_nodes: dict[str, Info]) -> dict[str, Any]:
    """A graph whose only node holds the blueprint's nodes. Its widgets give their values to the nodes inside."""
    subgraph, values = _subgraph(blueprint, all_nodes)
    number = len(subgraph["nodes"]) + 1
    ends = {key: [{"name": end["name"], "type": end["type"]} for end in subgraph[key]] for key in ("inputs", "outputs")}
    node = {
        "id": number,
        "type": subgraph["id"],
        "pos": [0, 0],
        "size": [400, 300],
        "flags": {},
        "order": 0,
        "mode": 0,
        "title": blueprint.title,
        "inputs": [{**end, "widget": {"name": end["name"]}, "link": None} for end in ends["inputs"]],
        "outputs": [{**end, "links": []} for end in ends["outputs"]],
        "properties": {},
        "widgets_values": values,
    }
    return {
        "id": _uuid(f"{blueprint.name}/graph"),
        "revision": 0,
        "last_node_id": number,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [subgraph]},
        "extra": {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": list(blueprint.words)},
    }


def _subgraph(blueprint: Blueprint, all_nodes: dict[str, Info]) -> tuple[dict[str, Any], list[Any]]:
    """The definition of the blueprint's subgraph, and the values of its widgets."""
    numbers = {node.key: number for number, node in enumerate(blueprint.nodes(), start=1)}
    graph = _graph(blueprint, numbers, all_nodes)
    by_key = {key: graph["nodes"][number - 1] for key, number in numbers.items()}
    links = [dict(zip(_LINK, link, strict=True)) for link in graph["links"]]
    ends: dict[str, list[dict[str, Any]]] = {"inputs": [], "outputs": []}

    def add(side: str, slot: dict[str, Any], origin: tuple[int, int], target: tuple[int, int]) -> int:
        number = len(links) + 1
        links.append(dict(zip(_LINK, (number, *origin, *target, slot["type"]), strict=True)))
        end = {"id": _uuid(f"{blueprint.name}/{side}/{slot['name']}"), "name": slot["name"], "type": slot["type"]}
        ends[side].append({**end, "linkIds": [number]})
        return number

    values: list[Any] = []
    for key, widget in blueprint.app_inputs:
        node = by_key[key]
        index, slot = next(pair for pair in enumerate(node["inputs"]) if pair[1]["name"] == widget)
        slot["link"] = add("inputs", slot, (_INPUTS, len(values)), (node["id"], index))
        values.append(node["widgets_values_named"][widget])
    for node in (by_key[key] for key in blueprint.app_outputs):
        for index, slot in enumerate(node["outputs"]):
            slot["links"].append(add("outputs", slot, (node["id"], index), (_OUTPUTS, len(ends["outputs"]))))
    right = max(node["pos"][0] + node["size"][0] for node in graph["nodes"])
    subgraph = {
        "id": graph["id"],
        "version": 1,
        "state": {"lastGroupId": 0, "lastNodeId": len(numbers), "lastLinkId": len(links), "lastRerouteId": 0},
        "revision": 0,
        "config": {},
        "name": blueprint.title,
        "inputNode": {"id": _INPUTS, "bounding": [-220, 0, 120, 40 + 20 * len(ends["inputs"])]},
        "outputNode": {"id": _OUTPUTS, "bounding": [right + 100, 0, 120, 40 + 20 * len(ends["outputs"])]},
        **ends,
        "widgets": [],
        "nodes": graph["nodes"],
        "groups": [],
        "links": links,
        "extra": {},
    }
    return subgraph, values


def _uuid(name: str) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"{PACK_NAME}/{name}"))


def _saved_note(node: Node) -> dict[str, Any]:
    return {"inputs": [], "outputs": [], "properties": {}, "widgets_values": [node.values["text"]]}


def _saved_node(node: Node, numbers: dict[str, int], links: list[list[Any]], info: Info) -> dict[str, Any]:
    number = numbers[node.key]
    ends = {link[4]: link[0] for link in links if link[3] == number}
    inputs = []
    for index, (name, spec) in enumerate(_inputs(info)):
        entry = {"name": name, "type": _type(spec), "link": ends.get(index)}
        if _is_widget(spec):
            entry["widget"] = {"name": name}
        elif name in info["input"].get("optional", {}):
            entry["shape"] = _OPTIONAL
        inputs.append(entry)
    outputs = []
    for index, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True)):
        starts = [link[0] for link in links if link[1] == number and link[2] == index]
        outputs.append({"name": name, "type": kind, "links": starts})
    ours = node.kind.startswith("QwenEdit_")
    properties: dict[str, Any] = {"cnr_id": PACK_NAME if ours else "comfy-core"}
    if ours:
        properties["ver"] = _VERSION.findall((REPO / "pyproject.toml").read_text(encoding="utf-8"))[0]
    properties["Node name for S&R"] = node.kind
    if node.models:
        properties["models"] = [dict(model) for model in node.models]
    values, named = [], {}
    for name, spec in _widgets(info):
        second = _second_value(name, spec)
        named |= {name: node.values.get(name, _default(spec)), **second}
        values += [named[name], *second.values()]
    known = {name for name, _ in _inputs(info)}
    if unknown := (node.values.keys() | node.links.keys()) - known:
        raise SystemExit(f"{node.kind} has no input named {', '.join(sorted(unknown))}.")
    return {
        "inputs": inputs,
        "outputs": outputs,
        "properties": properties,
        "widgets_values": values,
        "widgets_values_named": named,
    }


def _places(template: Template) -> dict[str, tuple[int, int]]:
    """Position of each node: columns from left to right, each from top to bottom, with gaps."""
    places: dict[str, tuple[int, int]] = {}
    x = 0
    for column in template.columns:
        y = 0
        for node in column:
            places[node.key] = (x, y)
            y += max(node.size[1], node.room) + _TITLE + _GAP
        x += max(node.size[0] for node in column) + _COLUMN_GAP
    return places


def _app(template: Template, numbers: dict[str, int]) -> dict[str, Any]:
    """What App mode shows, for frontends since 1.41: widgets as (node id, name), and nodes whose output is shown."""
    if not template.app_inputs:
        return {}
    inputs = [[numbers[key], widget] for key, widget in template.app_inputs]
    return {"linearData": {"inputs": inputs, "outputs": [numbers[key] for key in template.app_outputs]}}


def _inputs(info: Info) -> list[tuple[str, list[Any]]]:
    """Sockets first, then widgets, as ComfyUI's page numbers them."""
    items = [item for part in ("required", "optional") for item in info["input"].get(part, {}).items()]
    return sorted(items, key=lambda item: _is_widget(item[1]))


def _widgets(info: Info) -> list[tuple[str, list[Any]]]:
    return [(name, spec) for name, spec in _inputs(info) if _is_widget(spec)]


def _is_widget(spec: list[Any]) -> bool:
    return isinstance(spec[0], list) or (spec[0] in WIDGETS and not _options(spec).get("forceInput"))


def _type(spec: list[Any]) -> str:
    return "COMBO" if isinstance(spec[0], list) else spec[0]


def _options(spec: list[Any]) -> dict[str, Any]:
    return spec[1] if len(spec) > 1 else {}


def _default(spec: list[Any]) -> Any:
    options = _options(spec)
    choices = spec[0] if isinstance(spec[0], list) else options.get("options")
    if "default" in options:
        return options["default"]
    return choices[0] if choices else ""


def _second_value(name: str, spec: list[Any]) -> dict[str, str]:
    """The widget that the page adds to a seed or an upload, with its value. Empty for other widgets."""
    options = _options(spec)
    if options.get("image_upload"):
        return {"upload": "image"}
    seed = options.get("control_after_generate")
    is_seed = spec[0] == "INT" and (name in ("seed", "noise_seed") if seed is None else bool(seed))
    return {"control_after_generate": "fixed"} if is_seed else {}


def _output_index(info: Info, name: str) -> int:
    return info["output_name"].index(name)


def current(all_nodes: dict[str, Info]) -> dict[Path, dict[str, Any]]:
    """What `workflows` and `subgraphs` should contain."""
    files = {FOLDER / path: value for template in TEMPLATES for path, value in files_of(template, all_nodes).items()}
    return files | {BLUEPRINT_FOLDER / f"{each.title}.json": file_of(each, all_nodes) for each in BLUEPRINTS}


def main() -> int:
    """Write the files."""
    files = current(all_nodes())
    folders = (FOLDER, FOLDER / "api", BLUEPRINT_FOLDER)
    for path in (path for folder in folders for path in folder.glob("*.json")):
        if path not in files:
            path.unlink()
    for path, value in files.items():
        indent = 2 if path.parent.name == "api" else 1
        # ComfyUI reads blueprints in the encoding of the system, which is not UTF-8 on Windows.
        text = json.dumps(value, ensure_ascii=path.parent == BLUEPRINT_FOLDER, indent=indent) + "\n"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
