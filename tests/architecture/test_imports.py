"""Who may import whom. Read from the source, so that nothing has to be imported for it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tools.comfyui import REPO

CORE = REPO / "trainer_core"
NODES = REPO / "nodes"

# Each part imports only parts on a lower row, and itself.
ROWS = (
    ("errors", "settings", "config", "events", "rng", "geometry", "device", "files", "ranks"),
    ("weights",),
    ("precision",),
    ("qwen_image",),
    ("data",),
    ("conditioning",),
    ("adapters", "memory", "pictures"),
    ("training", "runs"),
    ("planning",),
    ("run", "sample", "job", "example"),
    ("__main__", "demo.pretrain"),  # programs
)
LEVEL = {part: level for level, row in enumerate(ROWS) for part in row}
# The demo's files and pictures stand beside the rows: what makes and describes them imports only the foundations.
LEVEL["demo"] = 1
LEVEL["presets"] = 1
LEVEL["simpletuner"] = 1  # other trainers' settings, turned into ours
# Leaves that lower rows may read, because they import nothing of ours but the settings.
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


def modules(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*.py") if "__pycache__" not in path.parts)


def part_of(path: Path) -> str:
    return part_named(".".join(path.relative_to(CORE).with_suffix("").parts))


def part_named(module: str) -> str:
    """The part that a dotted module name below trainer_core belongs to."""
    return "demo.pretrain" if (module + ".").startswith("demo.pretrain.") else module.split(".")[0]


def for_types_only(tree: ast.Module) -> set[ast.AST]:
    """Everything under `if TYPE_CHECKING:`."""
    blocks = [n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test)]
    return {node for block in blocks for child in block.body for node in ast.walk(child)}


def imports(path: Path, at_run_time: bool = False) -> Iterator[tuple[int, str]]:
    """(relative level, dotted name) of each import, also those inside functions and, unless told, for types only."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    left_out = for_types_only(tree) if at_run_time else set()
    for node in ast.walk(tree):
        if node in left_out:
            continue
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module:
                yield node.level, node.module
                yield from ((node.level, f"{node.module}.{alias.name}") for alias in node.names if node.level)
            else:
                yield from ((node.level, alias.name) for alias in node.names)


def core_imports(path: Path) -> Iterator[str]:
    """Dotted names below trainer_core that a core module imports."""
    package = list(path.relative_to(CORE).parts[:-1])
    for level, name in imports(path):
        if level:
            base = package[: len(package) - level + 1]
            yield ".".join([*base, name])
        elif name.startswith("trainer_core."):
            yield name.removeprefix("trainer_core.")


def upward(path: Path) -> list[str]:
    """Imports against the direction."""
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
    parts = {part_of(path) for path in modules(CORE)} - {"__init__"}
    assert parts <= set(LEVEL), f"no row for {sorted(parts - set(LEVEL))}"
    assert set(ROWS[0]) <= parts


@pytest.mark.parametrize("path", modules(CORE), ids=lambda path: path.relative_to(REPO).as_posix())
def test_core_imports_go_one_way(path: Path):
    assert upward(path) == []


def test_the_direction_is_really_read():
    """The reader sees the imports that are known to be there, and an upward one is found."""
    assert "errors" in set(core_imports(CORE / "settings.py"))
    assert "qwen_image.flavours" in set(core_imports(CORE / "simpletuner" / "convert.py"))
    seen = [name for path in modules(CORE) for name in core_imports(path)]
    assert len(seen) > 10
    assert LEVEL["data"] < LEVEL["training"] < LEVEL["run"]


@pytest.mark.parametrize("leaf", sorted({leaf for _, leaf in ALLOWED_UPWARD}))
def test_leaves_are_leaves(leaf: str):
    path = CORE.joinpath(*leaf.split(".")).with_suffix(".py")
    assert {name.split(".")[0] for name in core_imports(path)} <= {"errors", "config"}
    assert modules(path.parent)


def test_core_knows_nothing_of_comfyui():
    paths = modules(CORE)
    assert len(paths) > 10
    found = [(path.name, name) for path in paths for level, name in imports(path) if not level and top(name) in COMFYUI]
    assert found == []


def test_core_does_not_import_nodes_or_tools():
    bad = {"tools", "tests", "benchmarks"}
    found = [
        (path.name, name) for path in modules(CORE) for level, name in imports(path) if not level and top(name) in bad
    ]
    assert found == []


def test_only_host_modules_touch_comfyui_at_run_time():
    paths = modules(NODES)
    assert len(paths) > 3
    touching = {
        path.name
        for path in paths
        for level, name in imports(path, at_run_time=True)
        if not level and top(name) in COMFYUI_RUNTIME
    }
    assert touching == {f"host_{topic}.py" for topic in ("call", "encoders", "folders", "lora", "server")}


def test_the_pack_imports_itself_relatively():
    """ComfyUI imports it under a made-up name, and its folder `nodes` would shadow ComfyUI's module."""
    paths = [REPO / "__init__.py", *modules(NODES), *modules(CORE)]
    bad = {"trainer_core", "nodes"}
    absolute = [
        (path.relative_to(REPO).as_posix(), name)
        for path in paths
        for level, name in imports(path)
        if not level and top(name) in bad
    ]
    assert absolute == []


def test_pytest_has_not_imported_the_pack_as_a_test_package():
    import sys

    root = str(REPO / "__init__.py")
    assert root not in {getattr(module, "__file__", None) for module in list(sys.modules.values())}


def top(name: str) -> str:
    return name.split(".")[0]
