"""What all settings share: documentation of fields, checks, strict JSON in and out."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import re
import types
import typing
from collections.abc import Iterable, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin

from .errors import ConfigError

C = TypeVar("C")


def setting(default: Any, help: str, *, unless: str = "") -> Any:  # noqa: A002 - argparse's and click's word for it
    """A dataclass field with its documentation. With `unless` it must be given in JSON that lacks that other key."""
    return dataclasses.field(default=default, metadata={"help": help, "unless": unless})


def required(help: str) -> Any:  # noqa: A002
    """A dataclass field without a default, with its documentation."""
    return dataclasses.field(metadata={"help": help, "unless": ""})


def check(condition: bool, name: str, value: object, allowed: str) -> None:  # noqa: FBT001
    if not condition:
        raise ConfigError(f"{name} is {value!r}; allowed is {allowed}.")


def check_choice(owner: object, *names: str) -> None:
    hints = typing.get_type_hints(type(owner))
    for name in names:
        _check_among(get_args(hints[name]), name, getattr(owner, name))


def check_choices(owner: object, *names: str) -> None:
    """The same for settings that are tuples of choices."""
    hints = typing.get_type_hints(type(owner))
    for name in names:
        for value in getattr(owner, name):
            _check_among(get_args(get_args(hints[name])[0]), name, value)


def _check_among(allowed: tuple[str, ...], name: str, value: object) -> None:
    if value not in allowed:
        near = difflib.get_close_matches(str(value), allowed, 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{name} is {value!r}; allowed is one of {', '.join(allowed)}.{hint}")


def is_plain_name(name: str) -> bool:
    """Whether it can name a file or folder everywhere, and no other place than where it is put."""
    return bool(re.fullmatch(r"[\w][\w .()+-]{0,99}", name)) and not name.endswith((".", " "))


def check_at_least(owner: object, least: float, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        check(value >= least, name, value, f"{least} or more")


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[C], values: object, where: str = "") -> C:
    """Build a config from parsed JSON. A class's own `prepare_json(values)` may complete the values first.

    Raises:
        ConfigError: an unknown key (the nearest known one is named), a missing key, a value of the wrong type.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'The configuration'} is {values!r}; allowed is an object with named settings.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = typing.cast("dict[str, Any]", getattr(cls, "prepare_json", dict)(values))
    for key in values:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, 1)
            hint = f"Did you mean {near[0]!r}?" if near else f"Known are {', '.join(fields)}."
            raise ConfigError(f"Unknown setting {_dotted(where, key)!r}. {hint}")
    missing = [name for name, field in fields.items() if name not in values and _must_be_given(field, values)]
    if missing:
        raise ConfigError(
            f"Missing setting{'s' if len(missing) > 1 else ''} {', '.join(_dotted(where, m) for m in missing)}."
        )
    hints = typing.get_type_hints(cls)
    return cls(**{key: _value(hints[key], value, _dotted(where, key)) for key, value in values.items()})


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Parsed JSON objects laid over each other: what `above` does not say is as in `below`, inside objects too."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


def changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """Parsed JSON with some values replaced. A change is `name=value`, such as `encoding.resolution=512`.

    Values are JSON or else text. An object in a list is named by its `id` or number.

    Raises:
        ConfigError: a change without `=`, or into something that is no object.
    """
    values = json.loads(json.dumps(values))
    for change in changes:
        name, equals, text = change.partition("=")
        *parts, last = name.strip().split(".")
        if not equals or not last:
            raise ConfigError(f"A change is {change!r}; allowed is name=value, such as encoding.resolution=512.")
        try:
            value = json.loads(text)
        except json.JSONDecodeError:
            value = text.strip()
        place: Any = values
        for part in parts:
            place = _inside(place, part, change)
        if not isinstance(place, dict):
            raise ConfigError(f"A change is {change!r}, but {'.'.join(parts)} is {place!r} and holds no settings.")
        place[last] = value
    return values


def _inside(place: Any, part: str, change: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(part, {})
    named = [item for item in place if isinstance(item, dict) and item.get("id") == part] if place else []
    if isinstance(place, list) and (named or (part.isdigit() and int(part) < len(place))):
        return named[0] if named else place[int(part)]
    raise ConfigError(f"A change is {change!r}, but there is no {part!r}.")


def _must_be_given(field: dataclasses.Field[Any], values: dict[str, Any]) -> bool:
    if unless := field.metadata.get("unless"):
        return unless not in values
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _dotted(where: str, key: str) -> str:
    return f"{where}.{key}" if where else key


def _value(hint: Any, value: Any, where: str) -> Any:
    if get_origin(hint) is types.UnionType and dataclasses.is_dataclass(get_args(hint)[0]):
        return None if value is None else from_json(get_args(hint)[0], value, where)
    if dataclasses.is_dataclass(hint):
        return from_json(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        if isinstance(value, str) or not isinstance(value, list | tuple):
            raise ConfigError(f"{where} is {value!r}; allowed is a list.")
        return tuple(_value(get_args(hint)[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if get_origin(hint) in (Literal, types.UnionType):
        return value  # choices are checked by the dataclass, with the nearest name
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where} is {value!r}; allowed is a value of type {hint.__name__}.")
    return value


def digest(values: object) -> str:
    """A short name for equal JSON values (128 bits, hexadecimal)."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def nearest(name: object, known: Iterable[str]) -> str:
    """The known name that `name` is most likely a misspelling of; empty if none is close."""
    return next(iter(difflib.get_close_matches(str(name), list(known), 1)), "")
