"""Draws the imports between the rooms of the code into docs/architecture.md: python tools/structure.py

A room is a package or a top-level module of `trainer_core`, or all of `nodes`. The source is parsed, not imported, so
Python's standard library is enough.
"""

from __future__ import annotations

import ast
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
CORE = REPO / "trainer_core"
PAGE = REPO / "docs" / "architecture.md"
BEGIN, END = "<!-- rooms: begin -->", "<!-- rooms: end -->"
# Almost every room imports these, so they share one box. Only rooms that import nothing else have an arrow to it.
FOUNDATIONS = (
    "config",
    "device",
    "disk",
    "errors",
    "events",
    "files",
    "geometry",
    "json_text",
    "packages",
    "ranks",
    "rng",
    "settings",
    "text",
    "written_path",
)


def room_of(path: Path) -> str:
    """The room of a file in `trainer_core` or `nodes`."""
    if path.is_relative_to(CORE):
        return path.relative_to(CORE).with_suffix("").parts[0]
    return "nodes"


def imported_rooms(path: Path) -> set[str]:
    """Other rooms of `trainer_core` that a file imports, also inside functions."""
    package = path.relative_to(REPO).parts[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = (*package[: len(package) - node.level + 1], *(node.module or "").split("."))
        names = [tuple(part for part in (*base, alias.name) if part) for alias in node.names]
        found |= {dotted[1] for dotted in names if len(dotted) > 1 and dotted[0] == "trainer_core"}
    return found - {room_of(path)}


def arrows() -> dict[str, set[str]]:
    """The rooms that each room imports."""
    found: dict[str, set[str]] = {}
    for folder in (CORE, REPO / "nodes"):
        for path in sorted(folder.rglob("*.py")):
            if room_of(path) != "__init__" and "__pycache__" not in path.parts:
                found.setdefault(room_of(path), set()).update(imported_rooms(path))
    rooms = set(found)
    return {room: others & rooms for room, others in sorted(found.items())}


def drawing() -> str:
    """The rooms as a Mermaid graph. An arrow points from a room to one that it imports."""
    lines = ["```mermaid", "graph TD", f'    foundations["{", ".join(FOUNDATIONS)}"]']
    for room, others in arrows().items():
        if room in FOUNDATIONS:
            continue
        above = sorted(others - set(FOUNDATIONS))
        lines += [f"    {room} --> {other}" for other in above] or [f"    {room} --> foundations"]
    return "\n".join([*lines, "```"])


def with_drawing(page: str) -> str:
    """The page with the current drawing between its markers."""
    before, rest = page.split(BEGIN, 1)
    _, after = rest.split(END, 1)
    return f"{before}{BEGIN}\n\n{drawing()}\n\n{END}{after}"


def main() -> None:
    """Write the drawing into the page."""
    PAGE.write_text(with_drawing(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
