"""Text that others wrote: what is refused, and how it is shown in messages."""

from __future__ import annotations

import math
import reprlib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

LONGEST_TEXT = 4_096
"""Characters of a text setting, such as a name, a path or a pattern."""
LONGEST_PROMPT = 20_000
"""Characters of a caption or prompt. The limit in tokens is `tokenizer_max_length`."""
LONGEST_LINES = 200_000
"""Characters of a widget that holds several prompts, patterns or changes."""
LONGEST_LIST = 1_000
"""Items of a list setting."""
_INVISIBLE = frozenset({"Zs", "Zl", "Zp", "Cc", "Cf"})  # spaces, line ends, control and zero-width characters
_BLANK_LETTERS = frozenset("\u034f\u115f\u1160\u2800\u3164\ufe0e\ufe0f\uffa0")  # fillers and variation selectors
_MOST_SHOWN = 200  # characters of a value in a message
_LONGEST_NAME = 300  # characters of a path in a message
_BEGINNING = 60  # characters of a caption in a message
_LARGEST_SHOWN = 10**40  # Python refuses to write integers of more than 4,300 digits


def text_problem(text: str, longest: int = LONGEST_PROMPT) -> str:
    """Why a text can't be used, as the end of "It ..."; empty if it can.

    A lone surrogate can't be encoded as UTF-8, and a NUL character ends a name early in system calls.
    """
    if len(text) > longest:
        return f"has {len(text):,} characters; at most {longest:,} are allowed"
    if "\0" in text:
        return "contains a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"contains half a surrogate pair at character {error.start + 1}, which is not valid Unicode"
    return ""


def is_blank(text: str) -> bool:
    """Whether a text has only spaces, control and zero-width characters, so that nothing of it is seen."""
    return all(unicodedata.category(c) in _INVISIBLE or c in _BLANK_LETTERS for c in text)


def printable(text: Path | str) -> str:
    """The whole text with non-printable characters escaped, such as line breaks and invalid Unicode."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def shown(text: Path | str) -> str:
    """A file name or line for use in a message: `printable`, with the middle left out if it is long."""
    text = str(text)
    return printable(text if len(text) <= _LONGEST_NAME else f"{text[:100]}…{text[-_LONGEST_NAME + 101 :]}")


def brief(value: object) -> str:
    """A value for use in a message: its `repr`, cut to about 200 characters, whatever its size and depth."""
    text = _BRIEF.repr(value)
    return text if len(text) <= _MOST_SHOWN + 50 else f"{text[:_MOST_SHOWN]}…"


def beginning(text: str) -> str:
    """The first 60 characters of a caption or prompt in quotes, for use in a message."""
    return repr(text[:_BEGINNING]) + ("…" if len(text) > _BEGINNING else "")


class _Brief(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = _MOST_SHOWN
        self.maxlevel, self.maxlist, self.maxtuple = 4, 20, 20
        self.fillvalue = "…"

    def repr_str(self, x: str, level: int) -> str:
        _ = level
        return repr(x) if len(x) <= _MOST_SHOWN else f"{x[:_MOST_SHOWN]!r}… ({len(x):,} characters)"

    def repr_int(self, x: int, level: int) -> str:
        _ = level
        return repr(x) if abs(x) < _LARGEST_SHOWN else f"a number of about {int(math.log10(abs(x))) + 1} digits"


_BRIEF: Any = _Brief()


def reason_of(error: BaseException) -> str:
    """What an error says, for use in a message that names the file: without the number and path of a system's error."""
    return shown(getattr(error, "strerror", None) or str(error) or type(error).__name__)


def counted(number: int, noun: str) -> str:
    """A number with a noun that takes an s in the plural: 1 pair, 2,000 pairs."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def to_fix(problems: int) -> str:
    """How many problems there are and what to do, as the end of a sentence before a list of them."""
    return f"{counted(problems, 'problem')}. Fix {'it' if problems == 1 else 'them'} and run again:"


def some_of(names: Sequence[str]) -> str:
    """The first three names of a list, for use in a message."""
    return ", ".join(map(shown, names[:3])) + (", …" if len(names) > 3 else "")
