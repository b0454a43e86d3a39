"""Makes the first refusal on Run name everything that is wrong with a training, not only what one node finds."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ..trainer_core.errors import Interrupted, SettingsError, TrainerError, split
from ..trainer_core.events import Observer, SilentObserver, Stop
from . import host_server
from .ahead import refused_at_once
from .before_start import NODES, problems_before
from .graph_values import GraphValues, NotConnectedError
from .raw_values import entries, needed_by
from .refused import for_page
from .short_train import Train
from .train import TrainLora
from .training import ADVANCED, SHORT, TRAININGS

_LOG = logging.getLogger(__name__)
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
    outputs = targets if isinstance(targets, list) else [node_id for node_id, *_ in entries(prompt)]
    asked_for = needed_by(prompt, *(each for each in outputs if isinstance(each, str)))
    found = {node_id: split(error) for node_id, error in refused_at_once(prompt).items()}
    values, observer = GraphValues(prompt, NODES), observer or _ForSeconds()
    for training, kind, _ in entries(prompt):
        if kind not in TRAININGS or training not in asked_for:
            continue
        if any(found.get(node_id) or values.refuses_itself(node_id) for node_id in needed_by(prompt, training)):
            try:
                _add(found, values, training, _problems(prompt, training, observer))
            except Interrupted:
                break
            except Exception:  # noqa: BLE001 - what was found before is told nevertheless
                _LOG.exception("A training could not be looked at before it is queued.")
    return {node_id: for_page(_as_one(errors)) for node_id, errors in found.items() if errors}


def _add(
    found: dict[str, tuple[TrainerError, ...]],
    values: GraphValues,
    training: str,
    problems: Sequence[tuple[str, TrainerError]],
) -> None:
    """Add the problems of a training. Those of a node that can't tell them are told at the training."""
    elsewhere = {str(error) for node_id, error in problems if node_id != training}
    found[training] = tuple(error for error in found.get(training, ()) if str(error) not in elsewhere)
    for node_id, error in problems:
        at, told = node_id, error
        if not _can_tell(_NODES[values.kind_of(node_id)]):
            if values.refuses_itself(node_id):  # ComfyUI says so at that node
                continue
            at, told = training, TrainerError(f"{_name_of(values, node_id)}: {error}")
        if str(told) not in map(str, found.get(at, ())):
            found[at] = (*found.get(at, ()), told)


def _can_tell(node: Any) -> bool:
    """Whether the node refuses what `refused` has noted about it. See `schema.Node`."""
    return "validate_inputs" in vars(node) and io.Hidden.unique_id in (node.define_schema().hidden or ())


def _as_one(errors: Sequence[TrainerError]) -> TrainerError:
    return errors[0] if len(errors) == 1 else SettingsError(errors)


def other_problems(hidden: Any, observer: Observer) -> Iterator[tuple[str, TrainerError]]:
    """What is wrong with the other nodes of the trainings that need a node, with the names of these nodes.

    `hidden`: the node's hidden inputs, with its `unique_id` and the `prompt`.
    """
    prompt, values = hidden.prompt, GraphValues(hidden.prompt, NODES)
    asked_for = host_server.asked_for(prompt)
    for training, kind, _ in entries(prompt):
        if kind in TRAININGS and training in asked_for and hidden.unique_id in needed_by(prompt, training):
            for node_id, error in _problems(prompt, training, observer):
                if node_id != hidden.unique_id:
                    yield _name_of(values, node_id), error


def _name_of(values: GraphValues, node_id: str) -> str:
    return _NODES[values.kind_of(node_id)].define_schema().display_name


def _problems(prompt: Any, training: str, observer: Observer) -> list[tuple[str, TrainerError]]:
    """The single problems of a training by node id, without those that ComfyUI tells itself."""
    found = [(node_id, each) for node_id, error in problems_before(prompt, training, observer) for each in split(error)]
    return [each for each in found if not isinstance(each[1], NotConnectedError)]
