"""The page's scripts are small modules with checked types that never parse text as HTML and contact no other host."""

from __future__ import annotations

import re
from pathlib import Path

from tests.support.source_files import MAX_FILE_LINES, report, text
from tools.comfyui import REPO

WEB = REPO / "web"
SCRIPTS = sorted(WEB.rglob("*.js"))
FORBIDDEN = re.compile(
    r"\b(?:innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\s*\(|new Function|setAttribute\(\s*[\"']on)"
    r"|https?://(?!www\.w3\.org/2000/svg)"
)
IMPORT = re.compile(r"^import .* from \"([^\"]+)\"", re.MULTILINE)
HOST_MODULES = {"../../scripts/app.js", "../../scripts/api.js"}  # ComfyUI's modules for extensions


def test_there_is_something_to_check():
    assert len(SCRIPTS) > 5
    assert FORBIDDEN.search("a.innerHTML = b") and FORBIDDEN.search("fetch('https://example.org')")


def badly_written(path: Path) -> list[str]:
    lines = text(path).splitlines()
    found = [] if lines[0] == "// @ts-check" else ["does not begin with // @ts-check"]
    found += [f"{len(lines)} lines, at most {MAX_FILE_LINES} are allowed"] if len(lines) > MAX_FILE_LINES else []
    return found + [
        f"line {number}: more than 120 characters" for number, line in enumerate(lines, 1) if len(line) > 120
    ]


def bad_imports(path: Path) -> list[str]:
    """Only the entry may import ComfyUI's modules. ComfyUI loads all scripts, so others may only define things."""
    entry, found = path.parent == WEB, []
    for target in IMPORT.findall(text(path)):
        script = (path.parent / target).resolve()
        ours = target.startswith(("./", "../")) and script.is_file() and script.is_relative_to(WEB.resolve())
        found += [] if ours or (entry and target in HOST_MODULES) else [f"imports {target}"]
    if not entry:
        top = [line for line in text(path).splitlines() if re.match(r"\w", line)]
        found += [line for line in top if not re.match(r"(?:export |import |function |async |const |let )", line)]
    return found


def test_scripts_are_small_and_checked():
    assert report(SCRIPTS, badly_written) == ""


def test_scripts_write_no_markup_and_reach_no_other_host():
    assert report(SCRIPTS, lambda path: FORBIDDEN.findall(text(path))) == ""


def test_scripts_import_only_what_they_may():
    assert report(SCRIPTS, bad_imports) == ""
