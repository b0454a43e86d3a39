"""Nodes and commands hand their observer on: a call without it can't be stopped, and shows no progress."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.source_files import nodes, python_files, report
from tools.comfyui import REPO


def names_of_observed() -> set[str]:
    """Public functions of trainer_core with a parameter `observer`."""
    functions = (
        node for path in python_files("trainer_core") for node in nodes(path) if isinstance(node, ast.FunctionDef)
    )
    return {
        function.name
        for function in functions
        if not function.name.startswith("_")
        and "observer" in [each.arg for each in (*function.args.args, *function.args.kwonlyargs)]
    }


def unobserved(tree: Iterator[ast.AST] | tuple[ast.AST, ...], observed: set[str]) -> Iterator[str]:
    """Calls of these functions without an argument that is called observer."""
    for node in tree:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            arguments = [*node.args, *(each.value for each in node.keywords)]
            name = ast.unparse(node.args[0]) if node.func.id == "partial" else node.func.id
            if name in observed and not any("observer" in ast.unparse(each) for each in arguments):
                yield f"{name} in line {node.lineno}"


def test_every_call_of_a_node_or_command_can_be_stopped() -> None:
    observed = names_of_observed()
    assert {"plan_dataset", "encode_planned", "check_pairs", "sample_edit"} <= observed
    paths = [*python_files("nodes"), *(REPO / "trainer_core" / name for name in ("job.py", "run.py", "__main__.py"))]

    def found(path: Path) -> Iterator[str]:
        return unobserved(nodes(path), observed)

    assert report(paths, found) == ""


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ("plan_dataset(pairs)", True),
        ("partial(plan_dataset, pairs)", True),
        ("plan_dataset(pairs, observer)", False),
        ("plan_dataset(pairs, observer=self.observer)", False),
        ("pair(pairs)", False),
    ],
)
def test_what_counts(source: str, is_found: bool) -> None:
    assert bool(list(unobserved(ast.walk(ast.parse(source)), {"plan_dataset"}))) == is_found
