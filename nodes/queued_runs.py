"""The trainings in ComfyUI's queue that have not begun, so that the page shows them from the moment they are queued."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from ..trainer_core.errors import ConfigError
from . import host_folders, host_server
from .active_runs import active_runs, has_ended
from .raw_values import entries, needed_by
from .training import TRAININGS
from .untrusted import checked_run_name, free_name


def queued_runs() -> list[dict[str, Any]]:
    """Run name and training node of each training in the queue that has not begun, the next one first."""
    running, waiting = host_server.queued_prompts()
    ended = host_server.ended_nodes() if running else set[str]()
    ended |= {str(run["node_id"]) for run in active_runs() if run["state"] == "training"}  # maybe under another name
    found: dict[str, dict[str, Any]] = {}
    for queued in (*running, *waiting):
        for name, node_id in _trainings(queued.prompt, needed_by(queued.prompt, *queued.outputs)):
            is_over = queued in running and (node_id in ended or has_ended(queued.id, node_id))
            if not is_over:
                found.setdefault(name, {"run_name": name, "node_id": node_id, "has_graph": True})
    return list(found.values())


def graph_of(run_name: str) -> dict[str, Any]:
    """The graph in the queue that trains this run, as in graph.json. Empty if there is none."""
    running, waiting = host_server.queued_prompts()
    for queued in (*running, *waiting):
        for name, node_id in _trainings(queued.prompt, needed_by(queued.prompt, *queued.outputs)):
            if name == run_name:
                workflow = (queued.extra.get("extra_pnginfo") or {}).get("workflow")
                return {"node_id": node_id, "prompt": queued.prompt, "workflow": workflow}
    return {}


def runs_fed_by(prompt: Any, node_id: str | None) -> dict[str, str]:
    """The training nodes that are asked for and need the output of this node, by the name of their run."""
    found = _trainings(prompt, host_server.asked_for(prompt))
    return {name: train for name, train in found if node_id in needed_by(prompt, train)}


def _trainings(prompt: Any, asked_for: Collection[str]) -> Iterator[tuple[str, str]]:
    """Run name and node id of the trainings among these nodes. Leaves out names that come through a link."""
    for node_id, kind, inputs in entries(prompt):
        if kind not in TRAININGS or node_id not in asked_for or not isinstance(inputs.get("run_name"), str):
            continue
        try:
            name = checked_run_name(inputs["run_name"])
        except ConfigError:
            continue
        is_new = inputs.get("if_run_exists") == "new run"
        yield free_name(host_folders.runs_dir(), name) if is_new else name, node_id
