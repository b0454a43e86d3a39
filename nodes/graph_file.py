"""Saves the graph that started a run in its folder, so that the page can open it or continue the run."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from ..trainer_core.files import write_atomically
from ..trainer_core.runs.view import MAX_FILE_BYTES, read_graph


def keep_graph(run_dir: Path, node_id: str | None, prompt: Any, extra: Any) -> None:
    """Write graph.json: the API `prompt`, and the `workflow` if the graph was queued from the page.

    Writes nothing if the node is unknown, is not in the prompt, or the graph is larger than MAX_FILE_BYTES.
    """
    if node_id is None or not isinstance(prompt, dict) or node_id not in prompt:
        return
    workflow = extra.get("workflow") if isinstance(extra, dict) else None
    data = json.dumps({"node_id": node_id, "prompt": prompt, "workflow": workflow}, ensure_ascii=False).encode()
    if len(data) <= MAX_FILE_BYTES:
        write_atomically(run_dir / "graph.json", data)


def graph_to_continue(run_dir: Path) -> dict[str, Any]:
    """`prompt` and `workflow` of a run, with the prompt changed to continue this run. Empty if no graph was saved."""
    graph = read_graph(run_dir)
    prompt, node_id = graph.get("prompt"), str(graph.get("node_id"))
    node = prompt.get(node_id) if isinstance(prompt, dict) else None
    if not isinstance(prompt, dict) or not isinstance(node, dict) or not isinstance(node.get("inputs"), dict):
        return {}
    prompt = copy.deepcopy(prompt)
    prompt[node_id]["inputs"] |= {"run_name": run_dir.name, "if_run_exists": "continue a kept run"}
    return {"node_id": node_id, "prompt": prompt, "workflow": graph.get("workflow")}
