"""Schemas that load on every supported ComfyUI, and widgets made from the core's settings.

An unknown keyword to `io.Schema` or an input makes the whole pack fail to load on an older ComfyUI, so keywords that
this ComfyUI doesn't know are left out; they are niceties such as search aliases.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any, Literal

from comfy_api.latest import io

CATEGORY = "training/qwen edit"


def node_schema(name: str, display_name: str, **keywords: Any) -> io.Schema:
    """The schema of the node with the permanent id `QwenEdit_<name>`."""
    known = {field.name for field in dataclasses.fields(io.Schema)}
    keywords = {key: value for key, value in keywords.items() if key in known}
    return io.Schema(node_id=f"QwenEdit_{name}", display_name=display_name, category=CATEGORY, **keywords)


def new_input(kind: Any, name: str, **keywords: Any) -> io.Input:
    """An input of the ComfyUI type `kind`, labelled with its own name in words."""
    known = inspect.signature(kind.Input.__init__).parameters
    keywords.setdefault("display_name", name.replace("_", " "))
    return kind.Input(name, **{key: value for key, value in keywords.items() if key in known})


def help_of(config: type, setting: str) -> str:
    """The documentation of one field of a config class."""
    return next(field for field in dataclasses.fields(config) if field.name == setting).metadata["help"]


def setting_input(config: type, setting: str, name: str = "", **keywords: Any) -> io.Input:
    """A widget for one field of a config class: its type, default and documentation; `keywords` add limits."""
    field = next(field for field in dataclasses.fields(config) if field.name == setting)
    hint, name = typing.get_type_hints(config)[setting], name or setting
    keywords.setdefault("tooltip", field.metadata["help"])
    if field.default is not dataclasses.MISSING:
        keywords.setdefault("default", field.default)
    if typing.get_origin(hint) is tuple:  # of texts: a line each, see `lines`
        return new_input(io.String, name, **{**keywords, "default": "", "multiline": True})
    if typing.get_origin(hint) is Literal:
        return new_input(io.Combo, name, options=list(typing.get_args(hint)), **keywords)
    return new_input({bool: io.Boolean, int: io.Int, float: io.Float, str: io.String}[hint], name, **keywords)


def lines(text: str) -> tuple[str, ...]:
    """The lines of a widget with several, without empty ones."""
    return tuple(line.strip() for line in text.splitlines() if line.strip())


def fields_of(config: type, values: dict[str, Any]) -> dict[str, Any]:
    """Those of `values` that are settings of `config`."""
    names = {field.name for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if name in names}


def new_output(kind: Any, name: str, tooltip: str) -> io.Output:
    """An output of the ComfyUI type `kind`."""
    return kind.Output(name, display_name=name.replace("_", " "), tooltip=tooltip)
