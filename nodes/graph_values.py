"""What nodes will output, as far as it follows from the widgets in a prompt, without running the graph."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..trainer_core.errors import ConfigError, TrainerError
from ..trainer_core.events import SILENT, Observer
from .raw_values import NoLink, Unusable, entries, inputs_of, is_link, value_of
from .schema import checked_values

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset
    from ..trainer_core.conditioning.encoding_plan import PlannedDataset

Link = tuple[str, int]
"""The id of a node, and the number of one of its outputs."""


_DEEPEST = 50  # nodes in a row; graphs have a few, but a prompt may be anything


class UnknownError(Exception):
    """The value of an input is not known yet, or ComfyUI refuses it."""


class NotConnectedError(ConfigError):
    """A required input has no link. ComfyUI says so itself when the graph is queued."""


class Foreseen:
    """Stands for a value that is not known before the graph runs. A node that takes one says how in `foresee`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeseenPairs(Foreseen):
    """Encoded pairs before they are encoded: the planned datasets whose pairs are `trained`, `every` dataset, and what
    encoding will make of them. `is_cache_known`: whether it is known which of them are in the cache."""

    trained: Sequence[PlannedDataset]
    every: Sequence[PlannedDataset]
    encoded: EncodedDataset
    is_cache_known: bool


class GraphValues:
    """The values in a prompt.

    Args:
        prompt: a prompt as the page sends it. It may be anything.
        nodes: this pack's nodes whose outputs can be found, by type. Their `foresee(observer, **inputs)` gives the
            outputs; a node without it gives them by `execute`, and gets widgets and other settings only.
        known: values that nodes have output already.
        observer: can stop the search.

    `refused` has the error of each node that refuses its own inputs, by node id.
    """

    def __init__(
        self,
        prompt: Any,
        nodes: Mapping[str, Any],
        known: Mapping[Link, Any] | None = None,
        observer: Observer = SILENT,
    ) -> None:
        self._entries = {node_id: (kind, inputs) for node_id, kind, inputs in entries(prompt)}
        self._nodes, self._known, self.observer = nodes, known or {}, observer
        self._found: dict[str, Any] = {}
        self._depth = 0
        self.refused: dict[str, TrainerError] = {}

    def kind_of(self, node_id: str) -> str:
        """The type of a node; "" if the prompt has no such node."""
        return self._entries.get(node_id, ("", {}))[0]

    def given(self, node_id: str) -> dict[str, Any]:
        """The inputs of a node as the prompt has them."""
        return self._entries.get(node_id, ("", {}))[1]

    def refuses_itself(self, node_id: str) -> bool:
        """Whether ComfyUI or the node itself will refuse its widgets when the prompt is validated."""
        node, given = self._nodes.get(self.kind_of(node_id)), self.given(node_id)
        if node is None:
            return False
        widgets = [each for each in inputs_of(node) if each.id in given and not isinstance(given[each.id], list)]
        try:
            values = _checked(node, {each.id: self._input(each, given[each.id], node) for each in widgets})
        except (UnknownError, TrainerError):
            return True
        return bool(_refusal(node, values))

    def inputs(self, node: Any, node_id: str, *, without: Iterable[str] = ()) -> dict[str, Any]:
        """The inputs of a node by name, as ComfyUI will hand them on, except those named in `without`.

        Raises:
            UnknownError: an input is not known yet, or ComfyUI refuses it.
            TrainerError: the node refuses an input, or a node before it refuses its own.
        """
        return _checked(node, self._raw_inputs(node, node_id, without))

    def _raw_inputs(self, node: Any, node_id: str, without: Iterable[str] = ()) -> dict[str, Any]:
        given, found, first_error = self.given(node_id), {}, None
        for each in inputs_of(node):
            if each.id not in given or each.id in without:
                continue
            try:
                found[each.id] = self._input(each, given[each.id], node)
            except (UnknownError, TrainerError) as error:  # look at the other inputs too, for all that is refused
                first_error = first_error or error
        if first_error is not None:
            raise first_error
        return found

    def _input(self, each: Any, given: Any, node: Any) -> Any:
        if isinstance(given, NoLink | Unusable):
            raise UnknownError
        if not isinstance(given, list):
            return value_of(each, given)
        try:
            return self.output(given)
        except UnknownError:
            if each.id in getattr(node, "FORESEEN_WITHOUT", ()):
                return Foreseen()
            raise

    def output(self, link: Any) -> Any:
        """What comes through a link.

        Raises:
            UnknownError, TrainerError: as `inputs`.
        """
        if not is_link(link):
            raise UnknownError
        source, number = link
        if (source, number) in self._known:
            return self._known[source, number]
        outputs = self._outputs(source)
        if not 0 <= number < len(outputs) or type(outputs[number]) is Foreseen:
            raise UnknownError
        return outputs[number]

    def _outputs(self, node_id: str) -> tuple[Any, ...]:
        """The outputs of a node, which is asked once."""
        if node_id not in self._found:
            self._found[node_id] = UnknownError()  # what a node gets that leads to itself
            try:
                self._found[node_id] = self._foreseen(node_id)
            except (UnknownError, TrainerError) as error:
                self._found[node_id] = error
                if isinstance(error, TrainerError) and not any(error is each for each in self.refused.values()):
                    self.refused[node_id] = error
        found = self._found[node_id]
        if isinstance(found, Exception):
            raise found
        return found

    def _foreseen(self, node_id: str) -> tuple[Any, ...]:
        node = self._nodes.get(self.kind_of(node_id))
        if node is None or self._depth >= _DEEPEST:
            raise UnknownError
        self._depth += 1
        try:
            values = self._raw_inputs(node, node_id)
        finally:
            self._depth -= 1
        if refusal := _refusal(node, values):
            self.refused[node_id] = ConfigError(refusal)
            raise UnknownError
        values = _checked(node, values)
        if lacking := [each for each in inputs_of(node) if not each.optional and each.id not in values]:
            self.refused[node_id] = not_connected(lacking[0])
            raise UnknownError
        if hasattr(node, "foresee"):
            return tuple(node.foresee(self.observer, **values))
        return tuple(node.execute(**values).args)


def _checked(node: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values that the node may use."""
    foreseen = {name: value for name, value in values.items() if isinstance(value, Foreseen)}
    given = {name: value for name, value in values.items() if name not in foreseen}
    return {**foreseen, **checked_values(node, given, whole=False)}


def _refusal(node: Any, values: Mapping[str, Any]) -> str:
    """Why the node itself refuses these values when the prompt is queued; "" if it does not."""
    if "validate_inputs" not in vars(node):
        return ""
    names = values.keys() & inspect.signature(node.validate_inputs).parameters.keys()
    answer = node.validate_inputs(**{name: values[name] for name in names})
    return answer if isinstance(answer, str) else ""


def not_connected(each: Any) -> NotConnectedError:
    """The error of a required input without a link. The page sends a value for every widget."""
    return NotConnectedError(f"The input {each.id} has no link. It needs: {each.tooltip}")
