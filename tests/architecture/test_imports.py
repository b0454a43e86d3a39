"""Which package may import which. The source is parsed, not imported."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from tests.support.source_files import nodes, python_files, report
from tools.comfyui import REPO

CORE = REPO / "trainer_core"
NODES = REPO / "nodes"

# Each part of trainer_core may import itself and parts in the same or an earlier row.
ROWS = (
    (
        *("errors", "text", "json_text", "settings", "config", "events"),
        *("rng", "geometry", "device", "disk", "written_path", "files", "packages", "ranks"),
    ),
    ("weights",),
    ("precision",),
    ("memory",),
    ("qwen_image",),
    ("data",),
    ("conditioning",),
    ("adapters", "pictures", "data_sets"),
    ("training", "runs"),
    ("planning",),
    ("run", "results", "dry_step", "products", "sample", "try_lora", "draft_captions", "job", "example"),
    ("__main__",),
)
LEVEL = {part: level for level, row in enumerate(ROWS) for part in row}
# Parts outside the rows: they may import only the first two rows.
LEVEL["demo"] = 1
LEVEL["presets"] = 1
LEVEL["simpletuner"] = 1  # other trainers' settings, turned into ours
# Exceptions: (part, module of a later row that it may import). The module may import only `errors` and `config`.
ALLOWED_UPWARD = {("simpletuner", "qwen_image.flavours")}
COMFYUI_RUNTIME = {
    "comfy",
    "comfy_execution",
    "comfy_extras",
    "comfyui_version",
    "execution",
    "folder_paths",
    "latent_preview",
    "node_helpers",
    "nodes",
    "server",
}
COMFYUI = COMFYUI_RUNTIME | {"comfy_api", "app", "main"}


CORE_FILES = python_files("trainer_core")
NODE_FILES = python_files("nodes")


def part_of(path: Path) -> str:
    return part_named(".".join(path.relative_to(CORE).with_suffix("").parts))


def part_named(module: str) -> str:
    """The part that a dotted module name below trainer_core belongs to."""
    return module.split(".")[0]


def for_types_only(path: Path) -> set[ast.AST]:
    """All syntax tree nodes under `if TYPE_CHECKING:`."""
    blocks = [n for n in nodes(path) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {node for block in blocks for child in block.body for node in ast.walk(child)}


@functools.cache
def imports(path: Path, at_run_time: bool = False) -> list[tuple[int, str]]:
    """(relative level, dotted name) of each import in the file, also inside functions.

    With at_run_time, imports under `if TYPE_CHECKING:` are left out.
    """
    left_out = for_types_only(path) if at_run_time else set()
    found: list[tuple[int, str]] = []
    for node in nodes(path):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            found += [(0, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                found.append((node.level, node.module))
                found += [(node.level, f"{node.module}.{alias.name}") for alias in node.names if node.level]
            else:
                found += [(node.level, alias.name) for alias in node.names]
    return found


def core_imports(path: Path) -> list[str]:
    """Dotted names below trainer_core that a core module imports."""
    package = list(path.relative_to(CORE).parts[:-1])
    relative = [".".join([*package[: len(package) - level + 1], dotted]) for level, dotted in imports(path) if level]
    prefix = "trainer_core."
    absolute = [
        dotted.removeprefix(prefix) for level, dotted in imports(path) if not level and dotted.startswith(prefix)
    ]
    return relative + absolute


def absolute_imports(path: Path, packages: set[str]) -> list[str]:
    """Absolute imports in the file that belong to one of these top-level packages."""
    return [dotted for level, dotted in imports(path) if not level and top(dotted) in packages]


def upward(path: Path) -> list[str]:
    """Imports that the rows don't allow."""
    part, wrong = part_of(path), []
    if part == "__init__":
        return list(core_imports(path))
    for name in core_imports(path):
        other = part_named(name)
        leaf = any(part == lower and (name + ".").startswith(higher + ".") for lower, higher in ALLOWED_UPWARD)
        same_row = LEVEL.get(other) == LEVEL[part]
        if other == part or leaf or (other in LEVEL and (LEVEL[other] < LEVEL[part] or same_row)):
            continue
        wrong.append(name)
    return wrong


def test_every_part_has_a_row():
    parts = {part_of(path) for path in CORE_FILES} - {"__init__"}
    assert parts <= set(LEVEL), f"no row for {sorted(parts - set(LEVEL))}"
    assert set(ROWS[0]) <= parts


def test_core_imports_go_one_way():
    assert report(CORE_FILES, upward) == ""


def test_the_reader_sees_imports():
    """Without finding any import, the test above would always pass."""
    assert "errors" in core_imports(CORE / "settings.py")
    assert "qwen_image.flavours" in core_imports(CORE / "simpletuner" / "convert.py")
    assert sum(len(core_imports(path)) for path in CORE_FILES) > 10
    assert LEVEL["data"] < LEVEL["training"] < LEVEL["run"]


@pytest.mark.parametrize("leaf", sorted({leaf for _, leaf in ALLOWED_UPWARD}))
def test_leaves_are_leaves(leaf: str):
    path = CORE.joinpath(*leaf.split(".")).with_suffix(".py")
    assert {dotted.split(".")[0] for dotted in core_imports(path)} <= {"errors", "config"}


def test_core_knows_nothing_of_comfyui():
    assert len(CORE_FILES) > 10
    assert report(CORE_FILES, lambda path: absolute_imports(path, COMFYUI)) == ""


def test_core_does_not_import_tools_tests_or_benchmarks():
    assert report(CORE_FILES, lambda path: absolute_imports(path, {"tools", "tests", "benchmarks"})) == ""


def test_only_host_modules_touch_comfyui_at_run_time():
    assert len(NODE_FILES) > 3
    touching = {
        path.name
        for path in NODE_FILES
        for level, dotted in imports(path, at_run_time=True)
        if not level and top(dotted) in COMFYUI_RUNTIME
    }
    assert touching == {f"host_{topic}.py" for topic in ("call", "encoders", "folders", "lora", "models", "server")}


def test_the_pack_imports_itself_relatively():
    """ComfyUI imports the pack under another name, and ComfyUI has a module `nodes` of its own."""
    paths = [REPO / "__init__.py", *NODE_FILES, *CORE_FILES]
    assert report(paths, lambda path: absolute_imports(path, {"trainer_core", "nodes"})) == ""


def test_pytest_has_not_imported_the_pack_as_a_test_package():
    import sys

    root = str(REPO / "__init__.py")
    assert root not in {getattr(module, "__file__", None) for module in list(sys.modules.values())}


def top(dotted: str) -> str:
    return dotted.split(".")[0]
