"""The nodes' base class, schemas that load on every supported ComfyUI, and widgets made from trainer_core's settings.

On an older ComfyUI an unknown keyword to `io.Schema` or an input would stop the whole pack from loading. Such keywords
are dropped; they are optional extras such as search aliases.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from comfy_api.latest import io

from ..trainer_core.disk import disk_errors
from ..trainer_core.errors import DiskError, TrainerError
from ..trainer_core.settings import hint_of, limits_of
from .door import checked_inputs
from .host_folders import without_paths
from .raw_values import NoLink, Unusable
from .refused import for_page, refusal_of
from .sockets import value_class

_LOG = logging.getLogger(__name__)
ID_PREFIX = "QwenEdit_"
"""What the permanent ids of all nodes of this pack begin with."""
CATEGORY = "training/qwen edit"  # of the short path
_ADVANCED = f"{CATEGORY}/advanced"
_KINDS = {bool: io.Boolean, int: io.Int, float: io.Float, str: io.String}


class Node(io.ComfyNode):
    """Base of all nodes. Their methods get only inputs that fit the schema.

    `execute` raises a ConfigError otherwise. `validate_inputs` and `fingerprint_inputs` return the message of this and
    of any other TrainerError, so they need not catch it. A node with `validate_inputs` and the hidden `unique_id` also
    refuses what `refused` has noted about it.
    """

    def __init_subclass__(cls, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        for name in ("execute", "validate_inputs", "fingerprint_inputs"):
            method = cls.__dict__.get(name)
            # ComfyUI makes subclasses of its own, with the methods that are wrapped already.
            if isinstance(method, classmethod) and not hasattr(method.__func__, "__wrapped__"):
                setattr(cls, name, classmethod(_at_the_door(method.__func__)))


def _at_the_door(method: Callable[..., Any]) -> Callable[..., Any]:
    """A node's method that first checks what it is given."""
    parameters = inspect.signature(method)
    names = list(parameters.parameters)[1:]

    @functools.wraps(method)
    def checked(cls: type[Node], *given: Any, **values: Any) -> Any:
        values = {**dict(zip(names, given, strict=False)), **values}
        if method.__name__ == "execute":
            with _named_as_people_do(), disk_errors():
                return method(cls, **checked_values(cls, values))
        if method.__name__ == "validate_inputs" and (refusal := refusal_of(cls.hidden)):
            return refusal
        # Before the graph runs, linked inputs are None. ComfyUI hands on only what `validate_inputs` names, also values
        # that it has refused.
        values = {name: None if isinstance(value, Unusable | NoLink) else value for name, value in values.items()}
        known = {name: value for name, value in values.items() if value is not None}
        try:
            with disk_errors():
                return method(cls, **{**values, **checked_values(cls, known, whole=False)})
        except TrainerError as error:
            return for_page(error)

    checked.__signature__ = parameters  # type: ignore[attr-defined] - ComfyUI reads the names of the inputs from it
    return checked


@contextmanager
def _named_as_people_do() -> Iterator[None]:
    """Errors name ComfyUI's folders as people do, and long ones are cut. ComfyUI shows them on the page."""
    try:
        yield
    except TrainerError as error:
        whole, text = without_paths(str(error)), for_page(error)
        if text != whole:
            _LOG.error("%s", whole)
        error.args = (text,)
        if isinstance(error, DiskError):
            error.strerror = text
        raise


def checked_values(cls: type[Node], values: dict[str, Any], *, whole: bool = True) -> dict[str, Any]:
    """`checked_inputs` of a node. `whole`: its required inputs must be there."""
    schema = cls.define_schema()
    inputs = [each for each in schema.inputs if whole or each.id in values]
    validated = inspect.signature(cls.validate_inputs).parameters
    return checked_inputs(
        schema.display_name, inputs, values, value_class, listed=schema.is_input_list, chosen_by_node=list(validated)
    )


def node_schema(name: str, display_name: str, *, category: str = _ADVANCED, **keywords: Any) -> io.Schema:
    """The schema of the node with the permanent id `ID_PREFIX` + `name`. `category`: its place in menus."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    keywords = {key: value for key, value in keywords.items() if key in known}
    return io.Schema(node_id=f"{ID_PREFIX}{name}", display_name=display_name, category=category, **keywords)


def new_input(kind: Any, name: str, **keywords: Any) -> io.Input:
    """An input of the ComfyUI type `kind`. Its default label is `name` with spaces."""
    known = _keywords_of(kind.Input)
    keywords.setdefault("display_name", name.replace("_", " "))
    return kind.Input(name, **{key: value for key, value in keywords.items() if key in known})


@functools.cache
def _keywords_of(input_class: type) -> frozenset[str]:
    """What the constructor of an input takes."""
    return frozenset(inspect.signature(input_class.__init__).parameters)


def help_of(config: type, setting: str) -> str:
    """Help text of a field of a config class."""
    return next(field for field in dataclasses.fields(config) if field.name == setting).metadata["help"]


def setting_input(config: type, setting: str, name: str = "", **keywords: Any) -> io.Input:
    """A widget with the type, default, limits and help text of a field of a config class. `keywords` override them."""
    field = next(field for field in dataclasses.fields(config) if field.name == setting)
    made = _widget_of(config, field, name or setting, keywords)
    if field.metadata["used_if"] and made.id == setting:  # for web/trainer/shown_widgets.js
        conditions = [each._asdict() for each in field.metadata["used_if"]]
        made.extra_dict = {"qwen_edit_used": {"if": conditions, "unused": field.metadata["unused"]}}
    return made


def _widget_of(config: type, field: dataclasses.Field[Any], name: str, keywords: dict[str, Any]) -> io.Input:
    setting, hint = field.name, hint_of(config, field.name)
    keywords.setdefault("tooltip", field.metadata["help"])
    if field.default is not dataclasses.MISSING:
        keywords.setdefault("default", field.default)
    if typing.get_origin(hint) is tuple:  # tuple[str, ...]: one value per line, see `lines`
        return new_input(io.String, name, **{**keywords, "default": "", "multiline": True})
    if typing.get_origin(hint) is Literal:
        return new_input(io.Combo, name, options=list(typing.get_args(hint)), **keywords)
    return new_input(_KINDS[hint], name, **{**_limits(config, setting, hint), **keywords})


def setting_inputs(config: type, settings: str, **keywords: Any) -> list[io.Input]:
    """A widget for each of the settings, whose names are separated by spaces."""
    return [setting_input(config, setting, **keywords) for setting in settings.split()]


def _limits(config: type, setting: str, kind: type) -> dict[str, Any]:
    """min, max, step and round of a number widget, as far as they are declared."""
    if kind not in (int, float):
        return {}
    limits = limits_of(config, setting)
    declared = {"min": limits.lowest, "max": limits.highest, "step": limits.step, "round": limits.round}
    return {key: kind(value) for key, value in declared.items() if value is not None}


def lines(text: str) -> tuple[str, ...]:
    """The non-empty lines of a multiline widget, stripped."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def fields_of(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """The items of `values` that are fields of `config`."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if name in names}


def new_output(kind: Any, name: str, tooltip: str) -> io.Output:
    """An output of the ComfyUI type `kind`. Its label is `name` with spaces."""
    return kind.Output(name, display_name=name.replace("_", " "), tooltip=tooltip)
