"""JSON as people write it: with // and /* */ comments and trailing commas."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError

_STRING = r'"(?:[^"\\]|\\.)*"'
_COMMENT = re.compile(rf"{_STRING}|//[^\n]*|/\*.*?\*/", re.DOTALL)
_TRAILING_COMMA = re.compile(rf"{_STRING}|,(?=\s*[\]}}])")


def read_loose_json(path: Path, name: str = "") -> Any:
    """The file's values. Messages call it `name`, if there is one, so that they need not tell where it lies.

    Raises:
        ConfigError: unreadable, or not JSON even so; with line and column.
    """
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Can't read {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not text in UTF-8. Save it with the encoding UTF-8.") from error
    try:
        return json.loads(plain_json(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error


def plain_json(text: str) -> str:
    """Comments and trailing commas replaced by blanks, so that lines and columns stay. Strings are left alone."""
    return _TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, text))


def _blank(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])
