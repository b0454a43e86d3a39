"""Limits that ruff does not know: lengths, and calls and files that have no place here."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import pytest

from tools.comfyui import REPO

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60
FORBIDDEN_CALLS = {"print", "eval", "exec", "compile", "__import__", "breakpoint", "input"}
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "subprocess", "joblib", "pip", "ctypes"}
FORBIDDEN_METHODS = {("os", "system"), ("os", "popen"), ("torch", "load"), ("np", "load"), ("torch", "save")}
NETWORK = {"socket", "urllib", "http", "requests", "httpx", "ftplib", "smtplib", "urllib3", "huggingface_hub"}
ABSOLUTE_PATH = re.compile(r"^(?:/(?!/)[\w.~-]+/|[A-Za-z]:[\\/]|\\\\|~/|file:)")


def sources(*folders: str) -> list[Path]:
    found = [path for folder in folders for path in (REPO / folder).rglob("*.py") if "__pycache__" not in path.parts]
    return sorted(found)


ALL = [REPO / "__init__.py", *sources("nodes", "trainer_core")]
SHIPPED = [path for path in ALL if "pretrain" not in path.parts]  # .comfyignore leaves that program out
OURS = [*ALL, *sources("tests", "tools", "benchmarks")]


def name(path: Path) -> str:
    return path.relative_to(REPO).as_posix()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_there_is_something_to_check():
    assert len(SHIPPED) > 15
    assert sum(len(functions(path)) for path in SHIPPED) > 50


@pytest.mark.parametrize("path", OURS, ids=name)
def test_no_file_is_too_long(path: Path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_FILE_LINES


@pytest.mark.parametrize("path", OURS, ids=name)
def test_no_function_is_too_long(path: Path):
    lengths = [(node.name, node.lineno, node.end_lineno - node.lineno + 1) for node in functions(path)]
    assert [each for each in lengths if each[2] > MAX_FUNCTION_LINES] == []


def forbidden(source: str) -> list[str]:
    """Calls and imports that a shipped file may not have."""
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
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


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_shipped_code_runs_no_code_and_opens_no_connection(path: Path):
    assert forbidden(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    "source", ["print(1)", "import pickle", "from subprocess import run", "eval('1')", "import torch\ntorch.load('x')"]
)
def test_the_search_finds_what_it_looks_for(source: str):
    assert forbidden(source)


@pytest.mark.parametrize("path", SHIPPED, ids=name)
def test_shipped_code_is_readable_on_any_console(path: Path):
    text = path.read_text(encoding="utf-8")
    assert not re.search("[\U0001f000-\U0001faff\u2600-\u27bf]", text), "emoji"


def texts(value: object) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts(item)]
    return [text for item in value for text in texts(item)] if isinstance(value, list) else []


def test_workflows_name_no_absolute_path():
    files = sorted((REPO / "workflows").rglob("*.json"))
    assert files
    found = {
        name(f): [t for t in texts(json.loads(f.read_text(encoding="utf-8"))) if ABSOLUTE_PATH.match(t)] for f in files
    }
    assert {file: paths for file, paths in found.items() if paths} == {}


@pytest.mark.parametrize("path", ["/home/me/x", "C:\\x", "C:/x", "\\\\server\\share", "~/x", "file:///x"])
def test_absolute_paths_are_recognised(path: str):
    assert ABSOLUTE_PATH.match(path)


@pytest.mark.parametrize("path", ["demo/target", "qwen/x.safetensors", "https://example.org/x", "a / b", "/"])
def test_other_texts_are_not_taken_for_paths(path: str):
    assert not ABSOLUTE_PATH.match(path)
