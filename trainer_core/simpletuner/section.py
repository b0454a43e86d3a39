"""One JSON object of SimpleTuner's configuration. Every key is either read or explained in the report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..settings import did_you_mean
from ..text import brief, shown
from ..written_path import control_problem, written_path

_LONGEST_TRUTH = 20  # characters of a boolean written as text


def words(text: str) -> tuple[str, ...]:
    """Split text into its words."""
    return tuple(text.split())


def put(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a setting in a job's JSON by its dotted name, such as `lora.lora_rank`."""
    *parts, name = dotted.split(".")
    for part in parts:
        values = values.setdefault(part, {})
    values[name] = value


def path_of(name: str, root: Path, key: str) -> str:
    """The path that a key names, below `root` if it is relative.

    Raises:
        ConfigError: it contains control characters or begins with the home folder of an unknown user.
    """
    if problem := control_problem(name):
        raise ConfigError(f"{key} {problem}.")
    try:
        return str(written_path(name, root))
    except ConfigError as error:
        raise ConfigError(f"{key}: {error}") from error


class Section:
    """Reads values by key and reports what happens to each key.

    `asked` holds every key that was read or declared with `knows`, whether or not the file has it. So the list of
    supported keys always matches the code that reads them.
    """

    def __init__(self, values: object, where: str, notes: list[str]) -> None:
        if not isinstance(values, dict):
            what = where or "The configuration"
            raise ConfigError(f"{what} must be an object with named settings, got {brief(values)}.")
        self._values = {shown(str(key).lstrip("-")): value for key, value in values.items()}
        self._left = set(self._values)
        self.asked: set[str] = set()
        self._noted: set[str] = set()
        self._where = where
        self._notes = notes

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def is_null(self, name: str) -> bool:
        """Whether the key is there, with the value null."""
        return name in self._values and self._values[name] is None

    def take(self, *names: str) -> Any:
        """The value of the first of these keys (alternative spellings) that has one, or None."""
        self.asked.update(names)
        found = [name for name in names if name in self._values]
        self._left -= set(found)
        given = [name for name in found if self._values[name] is not None]
        for other in given[1:]:
            if self._values[other] != self._values[given[0]]:
                self.note(other, f"left out, because {given[0]} means the same and is given too.")
        return self._values[given[0]] if given else None

    def whole(self, *names: str) -> int | None:
        """A whole number, which may be written as text."""
        value = self.number(*names)
        if value is not None and value != int(value):
            raise ConfigError(f"{self._named(names)} must be a whole number, got {value:g}.")
        return None if value is None else int(value)

    def number(self, *names: str) -> float | None:
        """A number, which may be written as text: SimpleTuner's examples use "1e-4"."""
        value = self.take(*names)
        if value is None or value == "":
            return None
        try:
            number = float("no" if isinstance(value, bool) else value)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"{self._named(names)} must be a number, got {brief(value)}.") from error
        if number - number != 0:
            raise ConfigError(f"{self._named(names)} must be a finite number, got {brief(value)}.")
        return number

    def truth(self, *names: str) -> bool | None:
        """True or false, which may be written as text."""
        value = self.take(*names)
        known = {"true": True, "false": False, "1": True, "0": False}
        if value is None or value == "":
            return None
        text = str(value).lower() if isinstance(value, str | int) and len(brief(value)) < _LONGEST_TRUTH else ""
        if text not in known:
            raise ConfigError(f"{self._named(names)} must be true or false, got {brief(value)}.")
        return known[text]

    def text(self, *names: str) -> str | None:
        """A string."""
        value = self.take(*names)
        if value is not None and not isinstance(value, str):
            raise ConfigError(f"{self._named(names)} must be text, got {brief(value)}.")
        return value

    def path(self, root: Path, *names: str) -> str:
        """A path, relative to `root` unless it is absolute; "" if there is none."""
        value = self.text(*names)
        return path_of(value, root, self._named(names)) if value else ""

    def inside(self, name: str) -> Section | None:
        """The object under a key as a section of its own."""
        value = self.take(name)
        return None if value is None else Section(value, self._dotted(name), self._notes)

    def note(self, key: str, text: str) -> None:
        """Add a line about a key, or about several with commas between them, to the report."""
        self._noted.update(key.split(", "))
        self._notes.append(f"{self._dotted(key)}: {text}")

    def knows(self, *names: str) -> None:
        """Declare keys that are read only together with other settings or elsewhere, so that they are not unknown."""
        self.asked.update(names)

    def settle(self, *names: str) -> None:
        """Declare keys that were read from the entry itself, or have a line already. They get no further reason."""
        self.asked.update(names)
        self._left -= set(names)

    def explain(self, reasons: Mapping[str, str], also_known: Iterable[str] = ()) -> None:
        """Report every key that was not read: the reason, or the most similar known key if the key is unknown.

        Then list the keys that were converted without a line of their own.
        """
        names = {*reasons, *self.asked, *also_known}
        for key in sorted(self._left):
            if key in reasons:
                self.note(key, f"left out; {reasons[key]}.")
            elif key in names:
                self.note(key, "left out, because it has no effect with these other settings.")
            else:
                self.note(key, f"UNKNOWN, left out.{did_you_mean(key, names)}")
        taken = [key for key in self._values if key not in self._noted]
        if taken:
            self._notes.append(f"{self._where or 'config.json'}: converted: {', '.join(taken)}.")

    def _named(self, names: tuple[str, ...]) -> str:
        return self._dotted(next((name for name in names if name in self._values), names[0]))

    def _dotted(self, key: str) -> str:
        return f"{self._where}.{key}" if self._where else key
