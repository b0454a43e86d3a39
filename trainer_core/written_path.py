"""Paths as people write them into settings: with `~`, with backslashes, and with escapes that JSON has taken."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from .disk import name_exists
from .errors import ConfigError
from .text import shown

_ESCAPES = {
    "\n": ("\\n", "a line break"),
    "\t": ("\\t", "a tab"),
    "\r": ("\\r", "a carriage return"),
    "\b": ("\\b", "a backspace"),
    "\f": ("\\f", "a form feed"),
}


def written_path(name: str, folder: Path) -> Path:
    """The path that a setting names, below `folder` if it is relative. `~` is the home folder.

    A backslash separates folders on every system, unless a file or folder has it in its name.

    Raises:
        ConfigError: there is no user of the name after `~`.
    """
    try:
        path = folder / Path(name).expanduser()
        if "\\" in name and os.sep == "/" and not name_exists(path):
            return folder / Path(name.replace("\\", "/")).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{shown(name)}: there is no user of the name after ~. Write the whole path.") from error
    return path


def control_problem(name: str) -> str:
    """What a path with control characters should be instead, as the end of "It ..."; empty if there are none."""
    found = [c for c in dict.fromkeys(name) if unicodedata.category(c) == "Cc"]
    if not found:
        return ""
    if any(c not in _ESCAPES for c in found):
        return f"contains a control character ({shown(name)}). Remove it"
    written = "".join(_ESCAPES[c][0] if c in _ESCAPES else c for c in name)
    taken = " and ".join(f"{_ESCAPES[c][0]} as {_ESCAPES[c][1]}" for c in found)
    doubled, plain = written.replace("\\", "\\\\"), written.replace("\\", "/")
    return f'was read with {taken}: "{shown(written)}". Write "{shown(doubled)}" or "{shown(plain)}"'
