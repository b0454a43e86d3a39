"""Checks what a node is given before the node sees it. Workflows and API callers may send anything.

ComfyUI converts some values, doesn't check others and passes on what other nodes return. So the widgets of a prompt are
checked before ComfyUI converts them (`raw_values.py`), and every node checks all its inputs against its own schema when
it gets them (see `schema.Node`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..trainer_core.errors import ConfigError
from ..trainer_core.settings import check_plain, is_plain
from ..trainer_core.text import LONGEST_LINES, LONGEST_TEXT, brief

PLAIN = {"BOOLEAN": bool, "INT": int, "FLOAT": float, "STRING": str}
_ON_OFF = {True: "on", False: "off"}
_JSON = (bool, int, float, str, list, dict, tuple, bytes)


def converted_raw(each: Any, value: Any, value_class: Callable[[str], type | None]) -> Any:
    """What ComfyUI makes of a value in a prompt, if it is of a type that the input takes or converts exactly.

    Ranges and choices are checked later. `each` and `value_class` are as for `checked_inputs`.

    Raises:
        ConfigError: names the input, the value and what is allowed.
    """
    kind = each.get_io_type()
    if kind in PLAIN:
        value = _converted(PLAIN[kind], value)
        check_plain(PLAIN[kind], each.id, value, _longest(each))
    elif kind == "COMBO":
        check_plain(str, each.id, _choice(each, value))
    elif value is not None or not each.optional:
        _check_socket(each.id, kind, value, value_class(kind))
    return value


def _converted(hint: type, value: Any) -> Any:
    """What ComfyUI makes of a value if that means the same, such as 5 of "5" and of 5.0; else the value itself."""
    if hint is str:
        return str(value) if is_plain(int, value) else value
    if hint is bool:
        return bool(value) if isinstance(value, int | float) and value in (0, 1) else value
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return value
    try:
        converted = hint(value)
    except (ValueError, OverflowError):
        return value
    return converted if isinstance(value, str) or converted == value else value


def checked_inputs(
    node: str,
    inputs: Sequence[Any],
    values: Mapping[str, Any],
    value_class: Callable[[str], type | None],
    *,
    listed: bool = False,
    chosen_by_node: Sequence[str] = (),
) -> dict[str, Any]:
    """The values that a node may use. An optional socket that got None counts as not connected and is left out.

    A CLIP or VAE of None is passed on: the node must say that it is missing, not go on with another one.

    Args:
        node: display name of the node, for messages.
        inputs: of its schema: objects with `id`, `optional`, `get_io_type()`, and as far as they apply `min`, `max`,
            `options` and `multiline`.
        values: what the node was given, by input id.
        value_class: the class of a socket type's values; None for types of other packs.
        listed: each value is a list of values.
        chosen_by_node: ids of lists of choices whose values the node checks itself.

    Raises:
        ConfigError: names every input that is wrong, its value and what is allowed.
    """
    found: dict[str, Any] = {}
    problems: list[str] = []
    for each in inputs:
        if each.id not in values:
            if not each.optional:
                problems.append(f"{each.id} is missing.")
            continue
        given, kind = values[each.id], each.get_io_type()
        items = given if listed and isinstance(given, list) else [given]
        is_socket = kind not in (*PLAIN, "COMBO")
        if is_socket and each.optional and items and all(item is None for item in items):
            if value_class(kind) is None:
                found[each.id] = None
            continue
        try:
            checked = [_checked(each, item, value_class, chosen_by_node) for item in items]
        except ConfigError as error:
            problems.append(str(error))
            continue
        if listed and not checked:
            problems.append(f"{each.id} is an empty list.")
        else:
            found[each.id] = checked if listed else checked[0]
    if problems:
        several = f"{len(problems)} inputs can't" if len(problems) > 1 else "An input can't"
        raise ConfigError("\n  - ".join([f"{several} be used in {node}:", *problems]))
    return found


def _checked(each: Any, value: Any, value_class: Callable[[str], type | None], chosen_by_node: Sequence[str]) -> Any:
    kind = each.get_io_type()
    if kind in PLAIN:
        _check_widget(each, PLAIN[kind], value)
    elif kind == "COMBO":
        return _checked_choice(each, value, chosen_by_node)
    else:
        _check_socket(each.id, kind, value, value_class(kind))
    return value


def _check_widget(each: Any, hint: type, value: Any) -> None:
    check_plain(hint, each.id, value, _longest(each))
    lowest, highest = getattr(each, "min", None), getattr(each, "max", None)
    if (lowest is not None and value < lowest) or (highest is not None and value > highest):
        raise ConfigError(f"{each.id} must be {_range(lowest, highest)}, got {brief(value)}.")


def _longest(each: Any) -> int:
    """Most characters of a text."""
    return LONGEST_LINES if getattr(each, "multiline", False) else LONGEST_TEXT


def _range(lowest: float | None, highest: float | None) -> str:
    if highest is None:
        return f"{lowest} or more"
    return f"at most {highest}" if lowest is None else f"{lowest} to {highest}"


def _checked_choice(each: Any, value: Any, chosen_by_node: Sequence[str]) -> Any:
    value, options = _choice(each, value), list(each.options or ())
    check_plain(str, each.id, value)
    if value not in options and each.id not in chosen_by_node:
        some = ", ".join(map(brief, options[:20])) + (", …" if len(options) > 20 else "")
        raise ConfigError(f"{each.id} must be one of {some}, got {brief(value)}.")
    return value


def _choice(each: Any, value: Any) -> Any:
    """The value, or "on" or "off" for the switch that older graphs have there."""
    return _ON_OFF[value] if isinstance(value, bool) and {"on", "off"} <= {*(each.options or ())} else value


def _check_socket(name: str, kind: str, value: Any, wanted: type | None) -> None:
    fits: bool = isinstance(value, wanted) if wanted else not isinstance(value, (*_JSON, type(None)))
    if kind == "IMAGE":
        fits = fits and value.ndim == 4 and min(value.shape) > 0 and value.shape[-1] in (1, 3, 4)
    if not fits:
        what = "pictures [number, height, width, channels]" if kind == "IMAGE" else f"connected to an output {kind}"
        shape = getattr(value, "shape", None)
        got = brief(value) if shape is None else f"a tensor of the shape {list(shape)}"
        raise ConfigError(f"{name} must be {what}, got {got}.")
