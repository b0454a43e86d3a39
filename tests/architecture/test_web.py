"""The page's part: small checked modules that take no stranger's text for markup and reach no other host."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tools.comfyui import REPO

from .test_style import MAX_FILE_LINES, name

WEB = REPO / "web"
SCRIPTS = sorted(WEB.rglob("*.js"))
FORBIDDEN = re.compile(
    r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\s*\(|new Function|setAttribute\(\s*[\"']on)"
    r"|https?://(?!www\.w3\.org/2000/svg)"
)
IMPORT = re.compile(r"^import .* from \"([^\"]+)\"", re.MULTILINE)
HOST_MODULES = {"../../scripts/app.js", "../../scripts/api.js"}  # the two that ComfyUI promises


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def test_there_is_something_to_check():
    assert len(SCRIPTS) > 5
    assert FORBIDDEN.search("a.innerHTML = b") and FORBIDDEN.search("fetch('https://example.org')")


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_is_small_and_checked(path: Path):
    assert text(path).startswith("// @ts-check\n")
    assert len(text(path).splitlines()) <= MAX_FILE_LINES
    assert max(map(len, text(path).splitlines())) <= 120


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_a_script_writes_no_markup_and_reaches_no_other_host(path: Path):
    assert FORBIDDEN.findall(text(path)) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=name)
def test_imports(path: Path):
    """Only the entry knows ComfyUI's modules. ComfyUI loads every script by itself, so the others do nothing then."""
    entry = path.parent == WEB
    for target in IMPORT.findall(text(path)):
        if entry and target in HOST_MODULES:
            continue
        assert target.startswith("./") and (path.parent / target).is_file(), target
    if not entry:
        top = [line for line in text(path).splitlines() if re.match(r"\w", line)]
        assert all(re.match(r"(?:export |import |function |async |const |let )", line) for line in top), top
