"""JSON files that keep the results of checks, so that a later check opens only pictures that have changed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from ..config import digest
from ..files import write_atomically
from ..text import printable, reason_of

K = TypeVar("K")
V = TypeVar("V")

_LOG = logging.getLogger(__name__)


def kept_file(checked_dir: Path, roots: Iterable[Path], prefix: str = "") -> Path:
    """The file in `checked_dir` for the results of these dataset folders. `prefix` tells kinds of results apart."""
    return checked_dir / f"{prefix}{digest([printable(root.absolute()) for root in roots])}.json"


def read_kept(file: Path | None, parse: Callable[[Any], dict[K, V]]) -> dict[K, V]:
    """What `parse` makes of the file's JSON value. Empty without a file, and if `parse` can't use its content."""
    if file is None:
        return {}
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
        return {}


def write_kept(file: Path, values: object) -> None:
    """Replace the file's content with JSON values. Only warns if it can't be written."""
    try:
        write_atomically(file, json.dumps(values).encode())
    except OSError as error:
        _LOG.warning("The results of the check are not kept, so the next check takes as long. %s", reason_of(error))
