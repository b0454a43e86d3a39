"""What is wrong with the nodes of the prompt that ComfyUI validates at the moment, or that it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from ..trainer_core.errors import Interrupted, Problems, TrainerError
from ..trainer_core.events import Observer

OtherProblems = Callable[[Any, Observer], Iterable[TrainerError]]

_PROBLEMS: ContextVar[Mapping[str, str]] = ContextVar("problems of nodes")
_LOOKS: list[OtherProblems] = []


def note_refusals(problems: Mapping[str, str]) -> None:
    """Note what is wrong, by node id, before ComfyUI validates a prompt in this task."""
    _PROBLEMS.set(problems)


def refusal_of(hidden: Any) -> bool | str:
    """What `validate_inputs` of a node with these hidden inputs returns: what is wrong with it, or True."""
    return _PROBLEMS.get({}).get(getattr(hidden, "unique_id", None) or "", True)


def look_for_others(look: OtherProblems) -> None:
    """Let `with_other_problems` find the problems of other nodes with `look`, which knows all nodes."""
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
        for look in _LOOKS:
            for other in look(hidden, observer):
                problems.add(other)
        problems.raise_all()
