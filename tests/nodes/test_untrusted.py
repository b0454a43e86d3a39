"""Names and paths from an untrusted workflow."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import PARENT

HOSTILE_FOLDERS = (
    "",
    " ",
    "..",
    "../x",
    "set/../../x",
    "set\\..\\..\\x",
    "~",
    "~/x",
    "//server/share",
    "\\\\server\\share",
    "\\\\?\\C:\\x",
    "C:\\Windows",
    "C:x",
    "/etc",
    "/",
    "set\x00",
    "link_out",
    "link_out/deep",
    "not_there",
    "picture.png",
)
HOSTILE_NAMES = (
    "",
    " ",
    ".",
    "..",
    "../x",
    "a/b",
    "a\\b",
    "/x",
    "C:x",
    ".hidden",
    "-x",
    "x.",
    "x ",
    "nul",
    "COM1.txt",
    "a\x00b",
    "a\nb",
    "a" * 81,
    "a*b",
    "a:b",
)


@pytest.fixture
def names(pack_module) -> ModuleType:
    """The module nodes/untrusted.py."""
    return pack_module("untrusted")


@pytest.fixture
def config_error(pack_module) -> type[Exception]:
    """ConfigError as `names` raises it: this import of the pack has its own class."""
    pack_module("untrusted")
    import sys

    return sys.modules[f"{PARENT}.trainer_core.errors"].ConfigError


@pytest.fixture
def roots(tmp_path: Path) -> dict[str, Path]:
    """Two allowed roots, each with a folder `set`. The first has a link to outside and a link into the second."""
    found = {"input": tmp_path / "private" / "input", "pictures": tmp_path / "private" / "pictures"}
    for root in found.values():
        (root / "set").mkdir(parents=True)
    (found["pictures"] / "only_here").mkdir()
    (tmp_path / "outside" / "deep").mkdir(parents=True)
    (found["input"] / "link_out").symlink_to(tmp_path / "outside", target_is_directory=True)
    (found["input"] / "link_across").symlink_to(found["pictures"] / "only_here", target_is_directory=True)
    (found["input"] / "picture.png").write_bytes(b"")
    return found


@pytest.mark.parametrize("name", HOSTILE_FOLDERS)
def test_hostile_folders_are_refused(
    name: str, names: ModuleType, roots: dict[str, Path], config_error, tmp_path: Path
):
    with pytest.raises(config_error) as caught:
        names.folder_below(name, roots, "target_folder")
    message = str(caught.value)
    assert message.startswith("target_folder is ")
    assert "input, pictures" in message
    assert str(tmp_path) not in message


def test_a_neighbour_whose_name_begins_alike_is_outside(names: ModuleType, roots: dict[str, Path], config_error):
    neighbour = Path(f"{roots['input']}_secret")
    neighbour.mkdir()
    with pytest.raises(config_error, match="lies outside"):
        names.folder_below(str(neighbour), roots, "target_folder")


@pytest.mark.parametrize("name", ["set", " set ", "set/", "./set"])
def test_the_first_root_wins(name: str, names: ModuleType, roots: dict[str, Path]):
    assert names.folder_below(name, roots, "target_folder") == roots["input"].resolve() / "set"


def test_other_roots_and_links_between_roots(names: ModuleType, roots: dict[str, Path]):
    there = roots["pictures"].resolve() / "only_here"
    assert names.folder_below("only_here", roots, "target_folder") == there
    assert names.folder_below("link_across", roots, "target_folder") == there


def test_a_backslash_separates_folders_unless_it_is_in_a_name(names: ModuleType, roots: dict[str, Path]):
    inside = roots["pictures"].resolve() / "only_here"
    (inside / "deep").mkdir()
    (inside / "deep" / "table.csv").write_bytes(b"")
    assert names.folder_below("only_here\\deep", roots, "target_folder") == inside / "deep"
    assert names.file_below("deep\\table.csv", inside, roots, "caption_file") == inside / "deep" / "table.csv"
    near = names.near("only_here\\deep", roots["pictures"], roots, Path.is_dir)
    assert names.folder_below(near, roots, "target_folder") == inside / "deep"
    (inside / "deep\\er").mkdir()
    assert names.folder_below("only_here/deep\\er", roots, "target_folder") == inside / "deep\\er"


def test_a_run_name_fits_into_file_names(names: ModuleType, config_error):
    assert names.checked_run_name("é" * 80)
    with pytest.raises(config_error, match="at most 200 bytes"):
        names.checked_run_name("写" * 80)


def test_absolute_inside_a_root(names: ModuleType, roots: dict[str, Path]):
    inside = roots["pictures"].resolve() / "set"
    assert names.folder_below(str(inside), roots, "target_folder") == inside


def test_a_root_may_itself_be_a_link(names: ModuleType, tmp_path: Path):
    (tmp_path / "disk" / "set").mkdir(parents=True)
    (tmp_path / "input").symlink_to(tmp_path / "disk", target_is_directory=True)
    found = names.folder_below("set", {"input": tmp_path / "input"}, "target_folder")
    assert found == Path(os.path.realpath(tmp_path / "disk" / "set"))


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_hostile_run_names_are_refused(name: str, names: ModuleType, config_error):
    with pytest.raises(config_error, match=r"run_name (can't be|is empty)"):
        names.checked_run_name(name)


@pytest.mark.parametrize("name", ["a", "my_edit", "My edit 2.1+b-3", "Übung", "写真", "7"])
def test_plain_run_names(name: str, names: ModuleType):
    assert names.checked_run_name(name) == name


def test_free_names(names: ModuleType, tmp_path: Path):
    assert names.free_name(tmp_path, "run") == "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-2").mkdir()
    assert names.free_name(tmp_path, "run") == "run-3"


@pytest.mark.parametrize("name", [*HOSTILE_FOLDERS[:-1], "set", "../config.json", "link_out/x.json"])
def test_hostile_files_are_refused(name: str, names: ModuleType, roots: dict[str, Path], config_error, tmp_path: Path):
    (tmp_path / "outside" / "x.json").write_text("{}")
    for each in (name, names.near(name, roots["input"] / "set", roots, Path.is_file)):
        with pytest.raises(config_error) as caught:
            names.file_below_roots(each, roots, "config_file")
        assert str(caught.value).startswith("config_file is ") and str(tmp_path) not in str(caught.value)


def test_names_in_a_file_are_looked_for_from_the_file_upwards(
    names: ModuleType, roots: dict[str, Path], tmp_path: Path
):
    deep = roots["input"] / "set" / "config"
    deep.mkdir()
    for place in (deep, roots["input"] / "set", tmp_path / "private", roots["pictures"]):
        (place / "data.json").write_text("{}")
    found = names.file_below_roots(names.near("data.json", deep, roots, Path.is_file), roots, "data_file")
    assert found == deep / "data.json"
    (deep / "data.json").unlink()
    assert Path(names.near("data.json", deep, roots, Path.is_file)) == roots["input"] / "set" / "data.json"
    (roots["input"] / "set" / "data.json").unlink()
    assert names.near("data.json", deep, roots, Path.is_file) == "data.json"  # the search stops at the root
    assert names.file_below_roots("data.json", roots, "data_file") == roots["pictures"] / "data.json"
    assert names.near("only_here", deep, roots, Path.is_dir) == "only_here"
