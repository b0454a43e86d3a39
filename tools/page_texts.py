"""The texts of the page: the first arguments of all calls of `t` in its scripts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

WEB = Path(__file__).parents[1] / "web"
_COMMENT = re.compile(r"(?<!\S)/\*[\s\S]*?\*/|^\s*//.*$", re.MULTILINE)  # "image/*" starts none
_CALL = re.compile(r"(?<![\w.$])t\(\s*")
_LITERAL = re.compile(r'("(?:[^"\\\n]|\\.)*")\s*(?:\)|,\s*(?=[^\s)]))')
_UNTRANSLATED = re.compile(
    r'\b(?:text|title|tooltip|placeholder|summary|detail|"aria-label"|"aria-valuetext"): ["`](?=[^"`]*[A-Za-z]{2})'
)


def scripts() -> Iterator[tuple[str, str]]:
    """Name and source, without comments, of each script."""
    for path in sorted(WEB.rglob("*.js")):
        yield path.relative_to(WEB).as_posix(), _COMMENT.sub("", path.read_text(encoding="utf-8"))


def calls() -> Iterator[tuple[str, str, str | None]]:
    """Of each call of `t`: the script, its source from the first argument on, and the text if it is a literal."""
    for name, source in scripts():
        for call in _CALL.finditer(source):
            if source[: call.start()].endswith("function "):
                continue
            literal = _LITERAL.match(source, call.end())
            yield name, source[call.end() : call.end() + 300], json.loads(literal[1]) if literal else None


def page_texts() -> set[str]:
    """All texts that a catalogue translates."""
    return {text for _, _, text in calls() if text is not None}


def untranslated() -> list[str]:
    """Places where a script shows a text without `t`."""
    return [
        f"{name}: {source[found.start() : found.start() + 80]}"
        for name, source in scripts()
        for found in _UNTRANSLATED.finditer(source)
    ]
