"""Source files of this repository, read and parsed once per test session."""

from __future__ import annotations

import ast
import functools
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.comfyui import REPO

MAX_FILE_LINES = 400


def python_files(*folders: str) -> list[Path]:
    """All Python files below these folders of the repository."""
    found = [path for folder in folders for path in (REPO / folder).rglob("*.py") if "__pycache__" not in path.parts]
    return sorted(found)


def name(path: Path) -> str:
    """The path relative to the repository, with forward slashes."""
    return path.relative_to(REPO).as_posix()


@functools.cache
def text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


@functools.cache
def nodes(path: Path) -> tuple[ast.AST, ...]:
    """All nodes of the file's syntax tree, the module first."""
    return tuple(ast.walk(ast.parse(text(path), filename=str(path))))


def absolute_imports(path: Path) -> set[str]:
    """Top-level packages that the file imports absolutely, including imports inside functions."""
    found = {alias.name for node in nodes(path) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module or "" for node in nodes(path) if isinstance(node, ast.ImportFrom) and not node.level}
    return {dotted.split(".")[0] for dotted in found}


def report(paths: Iterable[Path], find: Callable[[Path], Iterable[object]]) -> str:
    """One line `file: finding` for each finding of `find`; empty if there is none."""
    return "\n".join(f"{name(path)}: {each}" for path in paths for each in find(path))
