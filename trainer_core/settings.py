"""What all settings share: declarations with limits, checks, and strict JSON input and output."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from .errors import ConfigError, Problems, SettingsError
from .json_text import parse_json
from .text import LONGEST_LIST, LONGEST_TEXT, brief, text_problem

C = TypeVar("C", bound="Settings")
_TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
_LARGEST_INT = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The values that a setting accepts. `str(limits)` says them in words, for errors and docs/settings.md."""

    min: float | None = None
    max: float | None = None
    above: float | None = None
    """Exclusive lower bound."""
    below: float | None = None
    """Exclusive upper bound."""
    also: float | None = None
    """One more accepted value, outside the bounds."""
    choices: tuple[float, ...] = ()
    soft_min: float | None = None
    """The lowest value that widgets offer. They need finite, inclusive bounds; JSON is checked against the others."""
    soft_max: float | None = None
    """The highest value that widgets offer."""
    step: float | None = None
    """Increment of widgets. Values between the steps are accepted."""
    round: float | None = None
    """Widgets round a number that is typed to a multiple of this. Default: of `step`."""
    unit: str = ""
    usual: str = ""
    """Typical values, in words."""
    longest: int = LONGEST_TEXT
    """Characters of a text, or of each text in a list."""
    valid: Callable[[Any], bool] | None = None
    """A check that bounds can't express. `allowed` says it in words."""
    allowed: str = ""

    def accept(self, value: Any) -> bool:
        """Whether the setting may have this value. NaN is outside all bounds."""
        if self.valid is not None and not self.valid(value):
            return False
        return (self.also is not None and value == self.also) or (
            (not self.choices or value in self.choices)
            and (self.min is None or value >= self.min)
            and (self.max is None or value <= self.max)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )

    @property
    def lowest(self) -> float | None:
        """The lowest value that a widget offers."""
        known = [value for value in (self.min, self.also, *self.choices) if value is not None]
        return self.soft_min if self.soft_min is not None else min(known, default=None)

    @property
    def highest(self) -> float | None:
        """The highest value that a widget offers."""
        known = [value for value in (self.max, *self.choices) if value is not None]
        return self.soft_max if self.soft_max is not None else max(known, default=None)

    def __str__(self) -> str:
        bounds = self.allowed or self._bounds()
        also = f"{_number(self.also)}, or " if self.also is not None else ""
        return also + bounds + (f", usually {self.usual}" if self.usual else "")

    def _bounds(self) -> str:
        unit = f" {self.unit}" if self.unit else ""
        if self.choices:
            return " or ".join(map(_number, self.choices)) + unit
        if self.min is not None and self.max is not None:
            return f"{_number(self.min)} to {_number(self.max)}{unit}"
        lower = f"above {_number(self.above)}{unit}" if self.above is not None else ""
        lower = f"{_number(self.min)}{unit} or more" if self.min is not None else lower
        upper = f"at most {_number(self.max)}{unit}" if self.max is not None else ""
        upper = f"below {_number(self.below)}{unit}" if self.below is not None else upper
        return " and ".join(filter(None, (lower, upper)))


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


class If(typing.NamedTuple):
    """A condition on another setting of the same class: it has one of the values `equals`, and none of `differs`."""

    setting: str
    equals: tuple[Any, ...] = ()
    differs: tuple[Any, ...] = ()

    def holds(self, values: Mapping[str, Any]) -> bool:
        """Whether these values meet it."""
        value = values.get(self.setting)
        return (not self.equals or value in self.equals) and value not in self.differs


def setting(
    default: Any,
    help: str,  # noqa: A002 - argparse's and click's word for it
    limits: Limits | None = None,
    *,
    unless: str = "",
    used_if: Sequence[If] = (),
    unused: Any = None,
) -> Any:
    """A dataclass field with its documentation and its limits.

    With `unless`, JSON must contain the setting if it lacks that other key. The setting changes something only if all
    conditions in `used_if` hold. `unused`: the one value that it may have otherwise; None if it may have any value.
    """
    declared = {"help": help, "unless": unless, "limits": limits or Limits(), "used_if": used_if, "unused": unused}
    return dataclasses.field(default=default, metadata=declared)


def required(help: str, limits: Limits | None = None) -> Any:  # noqa: A002
    """A dataclass field without a default, with its documentation and its limits."""
    return setting(dataclasses.MISSING, help, limits)


class Settings:
    """Base of all settings classes: checks every field against its declaration.

    Raises:
        ConfigError: values have the wrong type, are outside the field's `Limits`, or none of its choices; names all.
    """

    __slots__ = ()

    OLDER: ClassVar[Mapping[str, Mapping[str, str]]] = {}
    """By setting: values that older versions or SimpleTuner have, written as text, and those that replace them."""

    def __post_init__(self) -> None:
        for name in self.OLDER:
            object.__setattr__(self, name, _current(type(self), name, getattr(self, name)))
        problems = Problems()
        for name in _declared(type(self)):
            problems.attempt(functools.partial(check_setting, type(self), name, getattr(self, name)))
        problems.raise_all(SettingsError)
        self.check_combinations()

    def check_combinations(self) -> None:
        """Raises ConfigError if settings don't work together."""


def _current(cls: type[Settings], name: str, value: Any) -> Any:
    return cls.OLDER.get(name, {}).get(str(value), value) if type(value) in (bool, str) else value


@functools.cache
def _declared(cls: type) -> dict[str, tuple[Any, Limits]]:
    """Type hint and limits of each field."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)  # type: ignore[arg-type]
    return {field.name: (hints[field.name], field.metadata["limits"]) for field in fields}


def limits_of(cls: type, name: str) -> Limits:
    """The limits declared for a setting of this class."""
    return _declared(cls)[name][1]


def unused_fields(cls: Any, values: Mapping[str, Any]) -> list[dataclasses.Field[Any]]:
    """The settings of a class that change nothing if its settings have these values, as their declarations say."""
    return [each for each in dataclasses.fields(cls) if not all(on.holds(values) for on in each.metadata["used_if"])]


def hint_of(cls: type, name: str) -> Any:
    """The type declared for a setting of this class."""
    return _declared(cls)[name][0]


def check_setting(cls: type, name: str, value: object, called: str = "") -> None:
    """Raises ConfigError if the setting `name` of this class must not have this value. `called`: its name in errors."""
    (hint, limits), called = _declared(cls)[name], called or name
    _check_type(hint, limits, called, value)
    if get_origin(hint) not in (Literal, types.UnionType):
        check(limits.accept(value), called, value, str(limits))


def _check_type(hint: Any, limits: Limits, name: str, value: object) -> None:
    """Raises ConfigError if a value is not of the hinted type, or a text or list is unusable or too long."""
    if get_origin(hint) is Literal:
        check_choice(name, value, get_args(hint))
    elif get_origin(hint) is types.UnionType:
        check(isinstance(value, get_args(hint)), name, value, "an object or empty")
    elif get_origin(hint) is tuple:
        check(isinstance(value, tuple), name, value, "a list")
        items = typing.cast("tuple[object, ...]", value)
        _check_length(name, items)
        for item in items:
            _check_type(get_args(hint)[0], limits, name, item)
    elif dataclasses.is_dataclass(hint):
        check(isinstance(value, typing.cast("type", hint)), name, value, "an object with settings")
    else:
        check_plain(hint, name, value, limits.longest)


def _check_length(name: str, items: Sequence[object]) -> None:
    check(len(items) <= LONGEST_LIST, name, f"{len(items)} items", f"a list of at most {LONGEST_LIST} items")


def check_plain(hint: type, name: str, value: object, longest: int = LONGEST_TEXT) -> None:
    """Raises ConfigError unless the value is a bool, int, float or str, as `hint` says, that can be stored as JSON.

    A whole number is also a float. Not allowed: numbers that are infinite, NaN or have more than 64 bits, and texts
    that have more than `longest` characters, half a surrogate pair or a NUL character.
    """
    check(is_plain(hint, value), name, value, _type_name(hint, value))
    if isinstance(value, str) and (problem := text_problem(value, longest)):
        raise ConfigError(f"{name} {problem}, got {brief(value)}.")


def _type_name(hint: type, value: object) -> str:
    is_whole = type(value) is int and hint is int  # so it is too large
    return f"{_TYPE_NAMES[hint]} of at most 64 bits" if is_whole else _TYPE_NAMES[hint]


def is_plain(hint: type, value: object) -> bool:
    """Whether a value is of the type bool, int, float or str, and if it is a number, finite and of at most 64 bits."""
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, str):
        return hint is str
    if isinstance(value, int):
        return hint in (int, float) and abs(value) <= _LARGEST_INT
    return hint is float and isinstance(value, float) and math.isfinite(value)


def check(condition: bool, name: str, value: object, allowed: str) -> None:  # noqa: FBT001
    """Raises ConfigError unless the condition holds. `allowed` completes the sentence "`name` must be ..."."""
    if not condition:
        raise ConfigError(f"{name} must be {allowed}, got {brief(value)}.")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ConfigError, with the most similar choice, if the value is none of the choices."""
    if value not in choices:
        known = ", ".join(choices)
        raise ConfigError(f"{name} must be one of {known}, got {brief(value)}.{did_you_mean(value, choices)}")


def is_plain_name(name: str) -> bool:
    """Whether this is a file or folder name that is valid on every system and can't lead to another folder."""
    return bool(re.fullmatch(r"[\w][\w .()+-]{0,99}", name)) and not name.endswith((".", " "))


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_json(cls: type[C], values: object, where: str = "") -> C:
    """Build a config from parsed JSON. A list of texts may be given as one text.

    A static method `prepare_json(values)` of the class may first change the values.

    Raises:
        ConfigError: unknown keys (the error suggests the most similar ones), missing keys, or wrong values; names all.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{where or 'The configuration'} must be an object with named settings, got {brief(values)}.")
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    values = typing.cast("dict[str, Any]", getattr(cls, "prepare_json", dict)(values))
    hints, problems = typing.get_type_hints(cls), Problems()
    for key in (name for name in values if name not in fields):
        section = next((name for name, kind in hints.items() if key in _settings_of(kind)), None)
        hint = f" It belongs in {_dotted(where, section)}." if section else did_you_mean(key, fields)
        hint = hint or f" Known settings: {', '.join(fields)}."
        problems.add(ConfigError(f"Unknown setting {brief(_dotted(where, key))}.{hint}"))
    missing = [name for name, field in fields.items() if name not in values and _must_be_given(field, values)]
    if missing:
        listed = ", ".join(_dotted(where, name) for name in missing)
        problems.add(ConfigError(f"Missing setting{'s' if len(missing) > 1 else ''} {listed}."))
    made: dict[str, Any] = {}
    for key in (name for name in values if name in fields):
        check_value = functools.partial(_checked_value, cls, hints[key], key, values[key], _dotted(where, key))
        made[key] = problems.attempt(check_value)
    problems.raise_all(SettingsError)
    return cls(**made)


def _checked_value(cls: type[Settings], hint: Any, name: str, value: Any, where: str) -> Any:
    found = _current(cls, name, _value(hint, value, where))
    check_setting(cls, name, found, where)
    return found


def _settings_of(hint: Any) -> set[str]:
    """Names of the settings in a section; empty if the type is not a section."""
    return {field.name for field in dataclasses.fields(hint)} if dataclasses.is_dataclass(hint) else set()


def merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two parsed JSON objects merged, also inside nested objects. Values of `above` win."""
    both = {**below, **above}
    for key in below.keys() & above.keys():
        if isinstance(below[key], dict) and isinstance(above[key], dict):
            both[key] = merged(below[key], above[key])
    return both


def changed(values: dict[str, Any], changes: Sequence[str]) -> dict[str, Any]:
    """A copy of parsed JSON with some values replaced. A change is `name=value`, such as `encoding.resolution=512`.

    A value that is not valid JSON is taken as text. Objects in a list are addressed by their `id` or index.

    Raises:
        ConfigError: a change has no `=`, or the place it names is not inside an object.
    """
    values = json.loads(json.dumps(values))
    for change in changes:
        name, equals, text = change.partition("=")
        *parts, last = name.strip().split(".")
        if not equals or not last:
            raise ConfigError(f"A change must be name=value, such as encoding.resolution=512, got {brief(change)}.")
        try:
            value = parse_json(text, name)
        except ConfigError:
            value = text.strip()
            if len(value) > 1 and value[0] == value[-1] == '"':  # a text with quotes, such as "C:\data"
                raise
        place: Any = values
        for part in parts:
            place = _inside(place, part, change)
        if not isinstance(place, dict):
            where = brief(".".join(parts))
            raise ConfigError(f"Can't apply the change {brief(change)}: {where} is {brief(place)} and has no settings.")
        place[last] = value
    return values


def _inside(place: Any, part: str, change: str) -> Any:
    if isinstance(place, dict):
        return place.setdefault(part, {})
    items = place if isinstance(place, list) else []
    known = {str(number): item for number, item in enumerate(items)}
    known |= {item["id"]: item for item in items if isinstance(item, dict) and isinstance(item.get("id"), str)}
    if part in known:
        return known[part]
    there = brief(list(known) or place)
    raise ConfigError(f"Can't apply the change {brief(change)}: there is no {brief(part)} in {there}.")


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
        if isinstance(value, str) and not dataclasses.is_dataclass(get_args(hint)[0]):
            value = [value]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{where} must be a list, got {brief(value)}.")
        _check_length(where, value)
        return tuple(_value(get_args(hint)[0], item, f"{where}[{number}]") for number, item in enumerate(value))
    if get_origin(hint) in (Literal, types.UnionType):
        return value  # Settings checks choices
    check(is_plain(hint, value), where, value, _type_name(hint, value))
    return float(value) if hint is float else value


def digest(values: object) -> str:
    """A hash of JSON values as 32 hexadecimal digits. The order of keys does not matter."""
    return hashlib.sha256(json.dumps(values, sort_keys=True, ensure_ascii=False).encode()).hexdigest()[:32]


def did_you_mean(name: object, known: Iterable[str]) -> str:
    """The end of an error: " Did you mean ...?" with the known name most similar to `name`; "" if none is similar."""
    near = difflib.get_close_matches(name[:100], list(known), 1) if isinstance(name, str) else ()
    return f" Did you mean {near[0]!r}?" if near else ""
