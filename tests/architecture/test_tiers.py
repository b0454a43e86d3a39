"""The fast tier covers every part of the code, tests don't import each other, and the structure diagram is current."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from tests.support.source_files import nodes, python_files, report
from tests.support.tiers import FAST_PATHS
from tools import structure
from tools.comfyui import REPO

TESTS = python_files("tests")


def fast_files() -> list[Path]:
    paths = [REPO / path for path in FAST_PATHS]
    assert all(path.exists() for path in paths)
    return [file for file in TESTS if any(file == path or file.is_relative_to(path) for path in paths)]


def imported(path: Path) -> set[str]:
    """Dotted names that a test file imports."""
    found = {alias.name for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes(path):
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_room_has_a_test_in_the_fast_tier():
    rooms = set(structure.arrows()) - {"nodes"}
    tested = {dotted.split(".")[1] for path in fast_files() for dotted in imported(path) if "trainer_core." in dotted}
    assert sorted(rooms - tested) == []
    assert any("pack_module" in path.read_text(encoding="utf-8") for path in fast_files()), "no test of nodes/"


def test_tests_import_neither_each_other_nor_benchmarks():
    def wrong(path: Path) -> list[str]:
        return [
            name
            for name in sorted(imported(path))
            if name.split(".")[0] == "benchmarks" or re.match(r"tests\.(?!support\.)", name)
        ]

    assert report(TESTS, wrong) == ""


def test_the_drawn_structure_is_the_real_one():
    page = structure.PAGE.read_text(encoding="utf-8")
    assert structure.with_drawing(page) == page, "Run `make docs` to update the diagram."
