"""One JSON object of a foreign configuration: every key is taken or explained."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError


def words(text: str) -> tuple[str, ...]:
    """Names, parted by blanks."""
    return tuple(text.split())


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set one of our settings in a job's JSON by its name, such as `lora.lora_rank`."""
    *parts, name = dotted.split(".")
    for part in parts:
        values = values.setdefault(part, {})
    values[name] = value


class Section:
    """Hands out values by name and notes what became of each key."""

    def __init__(self, values: object, where: str, notes: list[str]) -> None:
        if not isinstance(values, dict):
            raise ConfigError(f"{where} must be an object with named settings, got {values!r}.")
        self._values = {str(key).lstrip("-"): value for key, value in values.items()}
        self._left = set(self._values)
        self._where = where
        self._notes = notes

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def take(self, *names: str) -> Any:
        """The first of these keys (spellings of one setting) that has a value, or None."""
        found = [name for name in names if name in self._values]
        self._left -= set(found)
        return next((self._values[name] for name in found if self._values[name] is not None), None)

    def whole(self, *names: str) -> int | None:
        """A whole number, also written as text."""
        value = self.number(*names)
        if value is not None and value != int(value):
            raise ConfigError(f"{self._named(names)} must be a whole number, got {value!r}.")
        return None if value is None else int(value)

    def number(self, *names: str) -> float | None:
        """A number, also written as text: SimpleTuner's own examples have "1e-4"."""
        value = self.take(*names)
        if value is None or value == "":
            return None
        try:
            number = float("no" if isinstance(value, bool) else value)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self._named(names)} must be a number, got {value!r}.") from error
        if number - number != 0:
            raise ConfigError(f"{self._named(names)} must be a finite number, got {value!r}.")
        return number

    def truth(self, *names: str) -> bool | None:
        """True or false, also written as text."""
        value = self.take(*names)
        known = {"true": True, "false": False, "1": True, "0": False}
        if value is None or str(value).lower() in known:
            return None if value is None else known[str(value).lower()]
        raise ConfigError(f"{self._named(names)} must be true or false, got {value!r}.")

    def text(self, *names: str) -> str | None:
        """A string."""
        value = self.take(*names)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self._named(names)} must be text, got {value!r}.")
        return value

    def inside(self, name: str) -> Section | None:
        """The object that stands under a key."""
        value = self.take(name)
        return None if value is None else Section(value, self._dotted(name), self._notes)

    def note(self, key: str, text: str) -> None:
        """A line of the report."""
        self._notes.append(f"{self._dotted(key)}: {text}")

    def explain(self, reasons: Mapping[str, str], known: Iterable[str]) -> None:
        """A line for every key that nobody took: why, or the nearest key that SimpleTuner has."""
        names = [*reasons, *known]
        for key in sorted(self._left):
            if key in reasons:
                self.note(key, f"left out; {reasons[key]}.")
            elif key in names:
                self.note(key, "left out; it has no effect together with the other settings.")
            else:
                near = difflib.get_close_matches(key, names, 1, 0.5)
                self.note(key, "UNKNOWN, left out." + (f" Did you mean {near[0]!r}?" if near else ""))

    def _named(self, names: tuple[str, ...]) -> str:
        return self._dotted(next((name for name in names if name in self._values), names[0]))

    def _dotted(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key
