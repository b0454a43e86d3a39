"""Rules that ruff does not check: lengths, and calls, imports and characters that shipped code must not contain."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.support.source_files import MAX_FILE_LINES, name, nodes, python_files, report, text
from tools.comfyui import REPO

MAX_FUNCTION_LINES = 60
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "joblib", "pip", "ctypes"}
FORBIDDEN_METHODS = {("os", "system"), ("os", "popen"), ("torch", "load"), ("np", "load"), ("torch", "save")}
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "ftplib", "smtplib", "urllib3", "huggingface_hub"}
ABSOLUTE_PATH = re.compile(r"^(?:/(?!/)[\w.~-]+/|[A-Za-z]:[\\/]|\\\\|~/|file:)")
EMOJI = re.compile("[\U0001f000-\U0001faff\u2600-\u27bf]")

SHIPPED = [REPO / "__init__.py", *python_files("nodes", "trainer_core")]
OURS = [*SHIPPED, *python_files("tests", "tools", "benchmarks")]


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in nodes(path) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def too_many_lines(path: Path) -> list[str]:
    lines = len(text(path).splitlines())
    return [f"{lines} lines, at most {MAX_FILE_LINES} are allowed"] if lines > MAX_FILE_LINES else []


def long_functions(path: Path) -> list[str]:
    lengths = [(node, (node.end_lineno or node.lineno) - node.lineno + 1) for node in functions(path)]
    return [f"{node.name}, line {node.lineno}: {n} lines" for node, n in lengths if n > MAX_FUNCTION_LINES]


def forbidden(nodes_of_a_file: Iterable[ast.AST]) -> list[str]:
    """Calls and imports among these nodes that shipped code must not contain."""
    found: list[str] = []
    for node in nodes_of_a_file:
        if isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name) and called.id in FORBIDDEN_CALLS:
                found.append(called.id)
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                pair = (called.value.id, called.attr)
                found += [".".join(pair)] if pair in FORBIDDEN_METHODS else []
        elif isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES | NETWORK]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found += [node.module or ""] if (node.module or "").split(".")[0] in FORBIDDEN_MODULES | NETWORK else []
    return found


def test_there_is_something_to_check():
    assert len(SHIPPED) > 15
    assert sum(len(functions(path)) for path in SHIPPED) > 50


def test_no_file_is_too_long():
    assert report(OURS, too_many_lines) == ""


def test_no_function_is_too_long():
    assert report(OURS, long_functions) == ""


def test_shipped_code_runs_no_code_and_opens_no_connection():
    assert report(SHIPPED, lambda path: forbidden(nodes(path))) == ""


@pytest.mark.parametrize(
    "source", ["print(1)", "import pickle", "from subprocess import run", "eval('1')", "import torch\ntorch.load('x')"]
)
def test_the_search_finds_what_it_looks_for(source: str):
    assert forbidden(ast.walk(ast.parse(source)))


SYSTEM_ERRORS = {"OSError", "FileNotFoundError", "FileExistsError", "PermissionError", "NotADirectoryError"}


def shown_system_errors(path: Path) -> list[str]:
    """Places that show the text of a system's error, such as "[Errno 2] No such file or directory: 'x'"."""
    found: list[str] = []
    for handler in (node for node in nodes(path) if isinstance(node, ast.ExceptHandler)):
        caught = {node.id for node in ast.walk(handler.type or handler) if isinstance(node, ast.Name)}
        inside = [node for statement in handler.body for node in ast.walk(statement)]
        values = [node.value for node in inside if isinstance(node, ast.FormattedValue)]
        for call in (node for node in inside if isinstance(node, ast.Call)):
            called = ast.unparse(call.func)
            values += call.args if called == "str" or called.startswith("_LOG.") else []
        names = [value for value in values if isinstance(value, ast.Name) and value.id == handler.name]
        found += [f"line {value.lineno}: use reason_of({value.id})" for value in names if caught & SYSTEM_ERRORS]
    return found


def test_messages_show_no_numbers_of_system_errors():
    assert report(SHIPPED, shown_system_errors) == ""


@pytest.mark.parametrize("use", ["f'{e}'", "str(e)", "_LOG.warning('%s', e)"])
def test_the_search_finds_system_errors(use: str, tmp_path: Path):
    source = tmp_path / "source.py"
    source.write_text(f"try:\n    pass\nexcept (ValueError, OSError) as e:\n    x = {use}\n")
    assert len(shown_system_errors(source)) == 1


def test_shipped_code_is_readable_on_any_console():
    assert report(SHIPPED, lambda path: [f"emoji {found}" for found in EMOJI.findall(text(path))]) == ""


def strings(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [string for item in value.values() for string in strings(item)]
    return [string for item in value for string in strings(item)] if isinstance(value, list) else []


def test_workflows_name_no_absolute_path():
    files = sorted((REPO / "workflows").rglob("*.json"))
    assert files
    found = {name(f): [t for t in strings(json.loads(text(f))) if ABSOLUTE_PATH.match(t)] for f in files}
    assert {file: paths for file, paths in found.items() if paths} == {}


@pytest.mark.parametrize("path", ["/home/me/x", "C:\\x", "C:/x", "\\\\server\\share", "~/x", "file:///x"])
def test_absolute_paths_are_recognised(path: str):
    assert ABSOLUTE_PATH.match(path)


@pytest.mark.parametrize("path", ["demo/target", "qwen/x.safetensors", "https://example.org/x", "a / b", "/"])
def test_other_texts_are_not_taken_for_paths(path: str):
    assert not ABSOLUTE_PATH.match(path)
