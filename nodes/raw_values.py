"""Checks the inputs of a queued prompt before ComfyUI converts them.

ComfyUI makes the text "None" of null, off of null, on of "false", 1 of true and 5 of 5.9. After that, nobody can tell
what was sent. So this looks at the prompt as it arrived, and replaces each value that would become another one by
something that ComfyUI refuses at that input.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

from ..trainer_core.errors import ConfigError
from ..trainer_core.text import brief
from .door import PLAIN, converted_raw
from .sockets import value_class


class Unusable(str):
    """Stands in a prompt for a value that must not be used. It reads as that value; converting it raises `problem`.

    It is a text because ComfyUI writes it into its answer as JSON.
    """

    problem = ""

    def _refuse(self) -> NoReturn:
        raise ConfigError(self.problem)

    __str__ = __bool__ = __int__ = __float__ = _refuse

    def __format__(self, _spec: str) -> str:
        return self[:]


class NoLink(list[str]):
    """Stands in a prompt for a value where a link or a choice must be. ComfyUI refuses a list that is no link."""


def refuse_wrong_types(prompt: Any, nodes: Mapping[str, Any]) -> None:
    """Replace the values of wrong types in the nodes of this pack. `nodes`: its classes by node id.

    Whatever else is wrong with the prompt is left to ComfyUI.
    """
    for _, kind, given in entries(prompt):
        for each in inputs_of(nodes[kind]) if kind in nodes else ():
            if each.id in given and not isinstance(given[each.id], list):  # a list is a link to another node
                given[each.id] = _checked(each, given[each.id])


def entries(prompt: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Id, type and inputs of each node in a prompt that has them."""
    for node_id, entry in prompt.items() if isinstance(prompt, dict) else ():
        kind, given = (entry.get("class_type"), entry.get("inputs")) if isinstance(entry, dict) else (None, None)
        if isinstance(kind, str) and isinstance(given, dict):
            yield node_id, kind, given


def is_link(given: Any) -> bool:
    """Whether an input of a prompt is a link."""
    return isinstance(given, list) and len(given) == 2 and isinstance(given[0], str) and isinstance(given[1], int)


def needed_by(prompt: Any, *node_ids: str) -> set[str]:
    """These nodes, and all nodes whose outputs they need, directly or through others."""
    inputs = {node_id: given for node_id, _, given in entries(prompt)}
    waiting, found = list(node_ids), set[str]()
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += [value[0] for value in inputs.get(each, {}).values() if is_link(value)]
    return found


@functools.cache
def inputs_of(node: Any) -> tuple[Any, ...]:
    """Inputs in the schema of a node, whose lists of choices may be out of date."""
    return tuple(node.define_schema().inputs)


def value_of(each: Any, given: Any) -> Any:
    """What ComfyUI makes of a value that is given for an input.

    Raises:
        ConfigError: the value has a wrong type.
    """
    value = given["__value__"] if isinstance(given, dict) and "__value__" in given else given
    return converted_raw(each, value, value_class)


def _checked(each: Any, given: Any) -> Any:
    """The value as it was given, or what ComfyUI refuses in its place."""
    try:
        value_of(each, given)
    except ConfigError as error:
        if each.get_io_type() not in PLAIN:
            return NoLink([str(error)])
        wrong = Unusable(brief(given))
        wrong.problem = str(error)
        return wrong
    return given
