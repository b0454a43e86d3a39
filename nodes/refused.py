"""What is wrong with the nodes of the prompt that ComfyUI validates at the moment, or that it runs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..trainer_core.errors import DiskError, Interrupted, OutOfMemoryError, Problems, TrainerError, listed, split
from ..trainer_core.events import Observer
from .host_folders import without_paths

_LOG = logging.getLogger(__name__)
_MOST_LINES = 30  # of one problem

OtherProblems = Callable[[Any, Observer], Iterable[tuple[str, TrainerError]]]

_PROBLEMS: ContextVar[Mapping[str, str]] = ContextVar("problems of nodes")
_LOOKS: list[OtherProblems] = []


def for_page(problem: TrainerError | str) -> str:
    """A message for the page: without paths of this machine, and with at most so many lines of each problem."""
    texts = [_cut(str(each)) for each in (split(problem) if isinstance(problem, TrainerError) else (problem,))]
    return texts[0] if len(texts) == 1 else listed(texts)


def _cut(text: str) -> str:
    lines = without_paths(text).split("\n")
    more = len(lines) - _MOST_LINES
    return "\n".join([*lines[:_MOST_LINES], f"… and {more} more lines."] if more > 1 else lines)


@contextmanager
def noted(problems: Mapping[str, str]) -> Iterator[None]:
    """Notes what is wrong, by node id, while ComfyUI validates a prompt in this task."""
    before = _PROBLEMS.set(problems)
    try:
        yield
    finally:
        _PROBLEMS.reset(before)


def refusal_of(hidden: Any) -> str:
    """What is noted as wrong with the node with these hidden inputs; empty if nothing."""
    return _PROBLEMS.get({}).get(getattr(hidden, "unique_id", None) or "", "")


def look_for_others(look: OtherProblems) -> None:
    """Let `with_other_problems` find the problems of other nodes with `look`, which knows all nodes.

    `look` gives the name of the node with each problem.
    """
    _LOOKS[:] = [look]


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
        own = problems.errors
        for name, other in _others(hidden, observer):
            if not _is_said(other, own):
                problems.add(TrainerError(f"{name}: {other}"))
        problems.raise_all()


def _others(hidden: Any, observer: Observer) -> list[tuple[str, TrainerError]]:
    try:
        return [each for look in _LOOKS for each in look(hidden, observer)]
    except Interrupted:
        raise
    except Exception:  # noqa: BLE001 - it must not hide the error of the node itself
        _LOG.exception("The other nodes of the graph could not be looked at.")
        return []


def _is_said(problem: TrainerError, said: Sequence[TrainerError]) -> bool:
    """Whether the problem is among these. Free memory and disk space differ a little from moment to moment."""
    measured = isinstance(problem, OutOfMemoryError | DiskError)
    return any(str(each) == str(problem) or (measured and type(each) is type(problem)) for each in said)
