"""The trainings in ComfyUI's queue that have not begun, so that the page shows them from the moment they are queued."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..trainer_core.errors import ConfigError
from . import host_folders, host_server
from .active_runs import has_ended
from .raw_values import entries
from .training import TRAININGS
from .untrusted import checked_run_name, free_name


def queued_runs() -> list[dict[str, Any]]:
    """Run name and training node of each training in the queue that has not begun, the next one first."""
    running, waiting = host_server.queued_prompts()
    ended = host_server.ended_nodes() if running else set[str]()
    found: dict[str, dict[str, Any]] = {}
    for queued in (*running, *waiting):
        for name, node_id in _trainings(queued.prompt):
            is_over = queued in running and (node_id in ended or has_ended(queued.id, node_id))
            if node_id in queued.outputs and not is_over:
                found.setdefault(name, {"run_name": name, "node_id": node_id})
    return list(found.values())


def graph_of(run_name: str) -> dict[str, Any]:
    """The graph in the queue that trains this run, as in graph.json. Empty if there is none."""
    running, waiting = host_server.queued_prompts()
    for queued in (*running, *waiting):
        for name, node_id in _trainings(queued.prompt):
            if name == run_name:
                workflow = (queued.extra.get("extra_pnginfo") or {}).get("workflow")
                return {"node_id": node_id, "prompt": queued.prompt, "workflow": workflow}
    return {}


def runs_fed_by(prompt: Any, node_id: str | None) -> dict[str, str]:
    """The training nodes that need the output of this node, by the name of their run."""
    found = _trainings(prompt)
    return {name: train for name, train in found if node_id in _needed_by(prompt, train)}


def _trainings(prompt: Any) -> Iterator[tuple[str, str]]:
    """Run name and node id of the trainings in a prompt. Leaves out names that come through a link."""
    for node_id, kind, inputs in entries(prompt):
        if kind not in TRAININGS or not isinstance(inputs.get("run_name"), str):
            continue
        try:
            name = checked_run_name(inputs["run_name"])
        except ConfigError:
            continue
        is_new = inputs.get("if_run_exists") == "new run"
        yield free_name(host_folders.runs_dir(), name) if is_new else name, node_id


def _needed_by(prompt: Any, node_id: str) -> set[str]:
    """Ids of all nodes whose outputs this node needs, directly or through others."""
    inputs = {name: given for name, _, given in entries(prompt)}
    waiting, seen = [node_id], set[str]()
    while waiting:
        links = [each for each in inputs.get(waiting.pop(), {}).values() if isinstance(each, list) and len(each) == 2]
        fresh = {each[0] for each in links if isinstance(each[0], str)} - seen
        seen |= fresh
        waiting += fresh
    return seen
