"""Converts a graph that ComfyUI's page saved to the prompt that the page would queue."""

from __future__ import annotations

from typing import Any

WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
NOTES = {"Note", "MarkdownNote"}


def known_to(node: dict[str, Any], all_nodes: dict[str, Any]) -> dict[str, Any]:
    """ComfyUI's description of a saved node. A newer ComfyUI adds optional inputs and outputs to its own nodes: without
    those that the node was saved without."""
    info = all_nodes[node["type"]]
    if node["type"].startswith("QwenEdit_"):
        return info
    saved, outputs = {entry["name"] for entry in node["inputs"]}, len(node["outputs"])
    optional = {name: spec for name, spec in info["input"].get("optional", {}).items() if name in saved}
    cut = {key: info[key][:outputs] for key in ("output", "output_name")}
    return {**info, **cut, "input": {**info["input"], "optional": optional}}


def widgets_of(info: dict[str, Any]) -> list[tuple[str, int]]:
    """(input id, number of saved values) of each widget in order. Seeds and uploads save a second value."""
    found = []
    for part in ("required", "optional"):
        for name, spec in info["input"].get(part, {}).items():
            kind, options = spec[0], spec[1] if len(spec) > 1 else {}
            if isinstance(kind, list) or (kind in WIDGETS and not options.get("forceInput")):
                seed = options.get("control_after_generate")
                extra = kind == "INT" and (name in ("seed", "noise_seed") if seed is None else bool(seed))
                found.append((name, 1 + bool(extra or options.get("image_upload"))))
    return found


def to_prompt(graph: dict[str, Any], all_nodes: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of a saved graph: node id -> class_type and inputs."""
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES:
            continue
        values, inputs = list(node["widgets_values"]), {}
        for name, count in widgets_of(known_to(node, all_nodes)):
            inputs[name] = values[0]
            del values[:count]
        assert not values, (node["type"], values)
        inputs |= {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt
