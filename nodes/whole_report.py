"""Makes the first refusal on Run name everything that is wrong with a training, not only what one node finds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ..trainer_core.errors import Interrupted, Problems, SettingsError, TrainerError
from ..trainer_core.events import Observer, SilentObserver, Stop
from . import host_server
from .ahead import refused_at_once
from .before_start import NODES, problems_before
from .graph_values import GraphValues, NotConnectedError
from .host_folders import without_paths
from .raw_values import entries
from .refused import note_refusals
from .short_train import Train
from .train import TrainLora
from .training import ADVANCED, SHORT, TRAININGS

_SECONDS = 3.0  # ComfyUI answers nothing else while it validates a prompt
_NODES = {**NODES, ADVANCED: TrainLora, SHORT: Train}


class _ForSeconds(SilentObserver):
    """Stops a search that takes too long."""

    def __init__(self) -> None:
        self._end = time.monotonic() + _SECONDS

    def should_stop(self) -> Stop:
        return Stop.PAUSE if time.monotonic() > self._end else Stop.NO


def note_problems(request: Mapping[str, Any]) -> None:
    """Note what is wrong with a queued prompt, for `validate_inputs` of the nodes.

    Pictures are looked at only if the training is refused anyway. Otherwise the nodes do that when they run.
    """
    prompt = request.get("prompt")
    found: defaultdict[str, Problems] = defaultdict(Problems)
    for node_id, error in refused_at_once(prompt).items():
        found[node_id].add(error)
    _note(found)
    values = GraphValues(prompt, NODES)
    if not found and not any(values.refuses_itself(node_id) for node_id, _, _ in entries(prompt)):
        return
    try:
        for node_id, error in _problems(prompt, _ForSeconds()):
            found[node_id].add(error)
    except Interrupted:  # the rest is told when the graph runs
        return
    _note(found)


def _note(found: Mapping[str, Problems]) -> None:
    one = {node_id: problems.errors for node_id, problems in found.items()}
    several = {node_id: errors[0] if len(errors) == 1 else SettingsError(errors) for node_id, errors in one.items()}
    note_refusals({node_id: without_paths(str(error)) for node_id, error in several.items()})


@contextmanager
def with_other_problems(hidden: Any, observer: Observer) -> Iterator[None]:
    """Adds to an error of this node what is wrong with the other nodes of the trainings that need it.

    `hidden`: the node's hidden inputs, with its `unique_id` and the `prompt`.
    """
    try:
        yield
    except Interrupted:
        raise
    except TrainerError as error:
        problems = Problems()
        problems.add(error)
        for other in _others(hidden, observer):
            problems.add(other)
        problems.raise_all()


def _others(hidden: Any, observer: Observer) -> Iterator[TrainerError]:
    for node_id, error in _problems(hidden.prompt, observer, needs=hidden.unique_id):
        if node_id != hidden.unique_id:
            kind = hidden.prompt[node_id]["class_type"]
            title = _NODES[kind].define_schema().display_name if kind in _NODES else kind
            yield TrainerError(f"{title}: {error}")


def _problems(prompt: Any, observer: Observer, needs: str = "") -> Iterator[tuple[str, TrainerError]]:
    """The problems of the trainings in a prompt by node id, only of those to which the node `needs` belongs."""
    for training, kind, _ in entries(prompt):
        if kind not in TRAININGS or (needs and not host_server.is_asked_for(training)):
            continue
        problems = problems_before(prompt, training, observer)
        if not needs or any(node_id == needs for node_id, _ in problems):
            yield from (each for each in problems if not isinstance(each[1], NotConnectedError))
