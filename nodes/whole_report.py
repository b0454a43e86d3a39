"""Makes the first refusal on Run name everything that is wrong with a training, not only what one node finds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from ..trainer_core.errors import Interrupted, Problems, SettingsError, TrainerError
from ..trainer_core.events import Observer, SilentObserver, Stop
from . import host_server
from .ahead import refused_at_once
from .before_start import NODES, problems_before
from .graph_values import GraphValues, NotConnectedError
from .host_folders import without_paths
from .raw_values import entries
from .short_train import Train
from .train import TrainLora
from .training import ADVANCED, SHORT, TRAININGS

_SECONDS = 3.0  # the page waits for the answer
_NODES = {**NODES, ADVANCED: TrainLora, SHORT: Train}


class _ForSeconds(SilentObserver):
    """Stops a search that takes too long."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SECONDS

    def should_stop(self) -> Stop:
        return Stop.PAUSE if time.monotonic() > self._end else Stop.NO


def refusals(request: Mapping[str, Any], observer: Observer | None = None) -> dict[str, str]:
    """What is wrong with a prompt that is to be queued, by node id, for `validate_inputs` of the nodes.

    Pictures are looked at only if a training that is asked for is refused anyway. Otherwise the nodes do that when they
    run. `observer` can stop that. What it then leaves out is told when the graph runs.
    """
    prompt, targets = request.get("prompt"), request.get("partial_execution_targets")
    found: defaultdict[str, Problems] = defaultdict(Problems)
    for node_id, error in refused_at_once(prompt).items():
        found[node_id].add(error)
    values, observer = GraphValues(prompt, NODES), observer or _ForSeconds()
    for training, kind, _ in entries(prompt):
        if kind not in TRAININGS or (isinstance(targets, list) and training not in targets):
            continue
        if any(node_id in found or values.refuses_itself(node_id) for node_id in values.needed(training)):
            try:
                for node_id, error in _problems(prompt, training, observer):
                    found[node_id].add(error)
            except Interrupted:
                break
    return {node_id: without_paths(str(_as_one(problems))) for node_id, problems in found.items()}


def _as_one(problems: Problems) -> TrainerError:
    return problems.errors[0] if len(problems.errors) == 1 else SettingsError(problems.errors)


def other_problems(hidden: Any, observer: Observer) -> Iterator[TrainerError]:
    """What is wrong with the other nodes of the trainings that need a node, with their titles in front.

    `hidden`: the node's hidden inputs, with its `unique_id` and the `prompt`.
    """
    prompt, values = hidden.prompt, GraphValues(hidden.prompt, NODES)
    for training, kind, _ in entries(prompt):
        is_asked_for = kind in TRAININGS and host_server.is_asked_for(training)
        if is_asked_for and hidden.unique_id in values.needed(training):
            for node_id, error in _problems(prompt, training, observer):
                if node_id != hidden.unique_id:
                    yield TrainerError(f"{_NODES[values.kind_of(node_id)].define_schema().display_name}: {error}")


def _problems(prompt: Any, training: str, observer: Observer) -> list[tuple[str, TrainerError]]:
    """The problems of a training by node id, without those that ComfyUI tells itself."""
    return [each for each in problems_before(prompt, training, observer) if not isinstance(each[1], NotConnectedError)]
