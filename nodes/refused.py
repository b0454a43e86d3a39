"""What is wrong with the nodes of the prompt that ComfyUI validates at the moment."""

from __future__ import annotations

from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

_PROBLEMS: ContextVar[Mapping[str, str]] = ContextVar("problems of nodes")


def note_refusals(problems: Mapping[str, str]) -> None:
    """Note what is wrong, by node id, before ComfyUI validates a prompt in this task."""
    _PROBLEMS.set(problems)


def refusal_of(hidden: Any) -> bool | str:
    """What `validate_inputs` of a node with these hidden inputs returns: what is wrong with it, or True."""
    return _PROBLEMS.get({}).get(getattr(hidden, "unique_id", None) or "", True)
