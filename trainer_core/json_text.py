"""Reads JSON that comes from outside, with limits, so that any text is either parsed or refused with its line."""

from __future__ import annotations

import json
import re
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .errors import ConfigError, TrainerError
from .text import brief, printable, shown

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 100  # Python's own limit is about 1000 levels, which later recursive calls would exceed
MAX_DIGITS = 100  # int() refuses 4300 digits; above 308 a number has no float
_STRING = r'"[^"\\]*(?:\\.[^"\\]*)*"?'  # an unclosed string ends with the text, which keeps the search linear
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?(?:\*/|\Z)", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[\]}}])", re.DOTALL)
_BRACKET = re.compile(rf"{_STRING}|[\[{{\]}}]", re.DOTALL)
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")

_Place = tuple[Any, str]  # the place of the enclosing value (None for the outermost), and a key or an index in it

MakeError = Callable[[str], TrainerError]


def read_json(
    path: Path,
    name: str = "",
    *,
    loose: bool = False,
    finite: bool = True,
    max_bytes: int = MAX_BYTES,
    error: MakeError = ConfigError,
) -> Any:
    """The parsed JSON of a file. `name` stands for the path in messages, to keep the path private.

    The other arguments are those of `parse_json`.

    Raises:
        ConfigError, or another `error`: the file can't be read, or see `parse_json`.
    """
    name = printable(name or str(path))
    try:
        is_file = stat.S_ISREG(path.stat().st_mode)  # reading a pipe or a device might never end
        data = _first_bytes(path, max_bytes + 1) if is_file else b""
    except OSError as problem:
        raise error(f"Can't read {name}: {problem.strerror}.") from problem
    except ValueError as problem:  # a NUL character or half of a surrogate pair in the path
        raise error(f"Can't read {name}: this is not a valid path.") from problem
    if not is_file:
        raise error(f"Can't read {name}: it is not a file.")
    return parse_json(data, name, loose=loose, finite=finite, max_bytes=max_bytes, error=error)


def parse_json(
    text: str | bytes,
    name: str,
    *,
    loose: bool = False,
    finite: bool = True,
    max_bytes: int = MAX_BYTES,
    error: MakeError = ConfigError,
) -> Any:
    """The parsed JSON of a text, or of UTF-8 bytes with or without a byte order mark.

    What it returns is safe to pass on: at most MAX_DEPTH levels deep, whole numbers of at most MAX_DIGITS digits, and
    texts that can be written as UTF-8 and contain no NUL character. Each key of an object occurs once.

    Args:
        text: what to parse.
        name: what it is called in messages, such as a path.
        loose: also accept // and /* */ comments and trailing commas.
        finite: refuse NaN, Infinity and numbers above the range of a float. False accepts them as floats.
        max_bytes: the largest size; longer text is refused.
        error: makes the exception from its message, for example RunFolderError.

    Raises:
        ConfigError, or another `error`: the text is no such JSON. Says what is wrong and in which line.
    """
    name = printable(name)
    if len(text) > max_bytes:
        raise error(f"{name} is larger than {max_bytes / 2**20:g} MiB, so it was not read. Is it the right file?")
    try:
        plain = text.decode("utf-8-sig") if isinstance(text, bytes) else text
    except UnicodeDecodeError as problem:
        raise error(f"{name} is not UTF-8 text. Save it as UTF-8.") from problem
    if not plain.strip():
        raise error(f"{name} is empty.")
    reader = _Reader(plain_json(plain) if loose else plain, name, finite=finite, error=error)
    found = reader.parse()
    reader.check(found)
    return found


def _first_bytes(path: Path, count: int) -> bytes:
    with path.open("rb") as file:
        return file.read(count)


def _hint(problem: json.JSONDecodeError) -> str:
    """What to do about a frequent mistake; empty for others."""
    found = problem.doc[problem.pos : problem.pos + 2]
    if "escape" in problem.msg:
        return " In a text, write \\\\ or / in place of one \\."
    if found in ("//", "/*") or found[:1] == "#":
        return " JSON has no comments. Remove them."
    if found[:1] == "'":
        return " Texts have double quotes."
    before = problem.doc[: problem.pos].rstrip()[-1:]
    if (before == "," and found[:1] in ("}", "]")) or "trailing comma" in problem.msg:  # Python 3.13 names the comma
        return " Remove the comma before the bracket."
    return ""


def plain_json(text: str) -> str:
    """Replace comments and trailing commas with spaces, which keeps line and column numbers. Skips strings."""
    return _TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, text))


def _blank(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])


class _Reader:
    """Parses one text and words its problems."""

    def __init__(self, text: str, name: str, *, finite: bool, error: MakeError) -> None:
        self._text = text
        self._name = name
        self._finite = finite
        self._error = error

    def parse(self) -> Any:
        try:
            return json.loads(
                self._text,
                object_pairs_hook=self._object,
                parse_int=self._whole,
                parse_float=self._number,
                parse_constant=self._constant,
            )
        except json.JSONDecodeError as problem:
            place = f"line {problem.lineno}, column {problem.colno}"
            hint = _hint(problem)
            raise self._error(f"{self._name} is not JSON: {problem.msg} in {place}.{hint}") from problem
        except RecursionError:
            self._refuse_depth()

    def check(self, value: Any) -> None:
        """Refuse too many levels, and texts that can't be written as UTF-8 or contain a NUL character."""
        left: list[tuple[Any, _Place | None, int]] = [(value, None, 0)]
        while left:
            item, place, depth = left.pop()
            if isinstance(item, str):
                self._check_text(item, place)
            elif isinstance(item, dict | list) and depth >= MAX_DEPTH:
                self._refuse_depth()
            elif isinstance(item, dict):
                for key in item:
                    self._check_text(key, place)
                left += [(each, (place, key), depth + 1) for key, each in item.items()]
            elif isinstance(item, list):
                left += [(each, (place, str(number)), depth + 1) for number, each in enumerate(item)]

    def _check_text(self, text: str, place: _Place | None) -> None:
        found = _UNWRITABLE.search(text)
        if not found:
            return
        keys: list[str] = []
        while place is not None:
            place, key = place
            keys.append(shown(key))
        what = "a NUL character" if found[0] == "\0" else f"half a surrogate pair (\\u{ord(found[0]):04x})"
        where = f" under {shown('.'.join(reversed(keys)))}" if keys else ""
        self._refuse(f"a text{where} contains {what}. Remove it")

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1)
            written = re.escape(json.dumps(twice, ensure_ascii=False))
            lines = [str(self._line(place.start())) for place in re.finditer(rf"{written}\s*:", self._text)]
            known = f" (lines {' and '.join(lines)})" if len(lines) == 2 else ""
            self._refuse(f"an object has the name {brief(twice)} twice{known}. Keep one")
        return found

    def _whole(self, literal: str) -> int:
        if len(literal.lstrip("-")) > MAX_DIGITS:
            self._refuse(f"a number has {len(literal.lstrip('-'))} digits{self._line_of(literal)}")
        return int(literal)

    def _number(self, literal: str) -> float:
        value = float(literal)
        if self._finite and abs(value) == float("inf"):
            self._refuse(f"the number {shown(literal)} is too large{self._line_of(literal)}")
        return value

    def _constant(self, literal: str) -> float:
        if self._finite:
            self._refuse(f"{literal} is not a number in JSON{self._line_of(literal)}")
        return float(literal)

    def _refuse(self, problem: str) -> NoReturn:
        raise self._error(f"{self._name} can't be used: {problem}.")

    def _refuse_depth(self) -> NoReturn:
        depth, place = 0, 0
        for found in _BRACKET.finditer(self._text):
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
            place = found.start()
            if depth > MAX_DEPTH:
                break
        self._refuse(f"its brackets are nested more than {MAX_DEPTH} levels deep in line {self._line(place)}")

    def _line_of(self, literal: str) -> str:
        """The end of a message: the line of the first such literal outside strings."""
        places = re.finditer(rf"{_STRING}|{re.escape(literal)}", self._text, re.DOTALL)
        return next((f" in line {self._line(place.start())}" for place in places if place[0] == literal), "")

    def _line(self, place: int) -> int:
        return self._text.count("\n", 0, place) + 1
