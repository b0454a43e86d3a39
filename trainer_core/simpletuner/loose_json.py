"""Read JSON with // and /* */ comments and trailing commas."""

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
    """The parsed values of a file. Messages use `name` instead of the path if it is given, to keep the path private.

    Raises:
        ConfigError: the file can't be read or is not JSON; gives line and column.
    """
    name = name or str(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise ConfigError(f"Can't read {name}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{name} is not UTF-8 text. Save it as UTF-8.") from error
    try:
        return json.loads(plain_json(text))
    except json.JSONDecodeError as error:
        raise ConfigError(f"{name} is not JSON: {error.msg} in line {error.lineno}, column {error.colno}.") from error


def plain_json(text: str) -> str:
    """Replace comments and trailing commas with spaces, which keeps line and column numbers. Skips strings."""
    return _TRAILING_COMMA.sub(_blank, _COMMENT.sub(_blank, text))


def _blank(found: re.Match[str]) -> str:
    return found[0] if found[0].startswith('"') else re.sub(r"[^\n]", " ", found[0])
