"""Layouts of other trainers: what can be read is read, and the rest is named in one line with the way on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from trainer_core.config import CaptionConfig, DatasetConfig
from trainer_core.data.pairing import FolderScan, folder_state, scan_folders

KEYS = ("000", "001", "002")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Folders `target` and `reference` with three pictures each, without captions."""
    for part in ("target", "reference"):
        (tmp_path / part).mkdir()
        for number, key in enumerate(KEYS):
            picture(tmp_path / part / f"{key}.png", 60 * number + len(part))
    return tmp_path


def picture(path: Path, grey: int = 9) -> None:
    Image.new("RGB", (16, 16), (grey, 0, 0)).save(path)


def texts(folder: Path, name: str) -> None:
    for key in KEYS:
        (folder / name.format(key)).write_text(f"edit {key}")


def config(root: Path, strategy: str = "textfile", **captions: str) -> DatasetConfig:
    return DatasetConfig(
        target_dir=str(root / "target"),
        reference_dirs=(str(root / "reference"),),
        caption_strategy=strategy,  # type: ignore[arg-type]
        captions=CaptionConfig(**captions),
    )


def captions(scan: FolderScan) -> dict[str, tuple[str, ...]]:
    assert scan.problems == ()
    return {pair.key: pair.captions for pair in scan.dataset.pairs}


def only_problem(scan: FolderScan) -> str:
    (problem,) = scan.problems
    return problem


EDITS = {key: (f"edit {key}",) for key in KEYS}


@pytest.mark.parametrize("name", ["{}.txt", "{}.caption", "{}.png.txt", "{}.png.caption", "{}.TXT"])
def test_names_of_caption_files_that_are_read(name: str, root: Path) -> None:
    texts(root / "target", name)
    scan = scan_folders(config(root))
    assert captions(scan) == EDITS
    assert scan.notes == ()
    before = folder_state(config(root))
    (root / "target" / name.format("000")).write_text("another edit")
    assert folder_state(config(root)) != before


def test_a_txt_file_comes_before_a_caption_file(root: Path) -> None:
    texts(root / "target", "{}.txt")
    (root / "target" / "001.caption").write_text("other")
    scan = scan_folders(config(root))
    assert captions(scan) == EDITS
    assert [note for note in scan.notes if "001.caption" in note and "a .txt file has the same name" in note]


def test_the_text_of_the_name_comes_before_that_of_the_file(root: Path) -> None:
    texts(root / "target", "{}.txt")
    (root / "target" / "001.png.txt").write_text("other")
    scan = scan_folders(config(root))
    assert captions(scan) == EDITS
    assert [note for note in scan.notes if "001.png.txt" in note]


def test_captions_beside_the_references_are_named_once(root: Path) -> None:
    texts(root / "reference", "{}.txt")
    problem = only_problem(scan_folders(config(root)))
    assert "3 targets without a caption, but" in problem and "000.txt, 001.txt, 002.txt" in problem
    assert problem.endswith("move them beside the targets.")


def test_numbered_references_in_their_folder_are_named_once(root: Path) -> None:
    texts(root / "target", "{}.txt")
    for key in KEYS:
        (root / "reference" / f"{key}.png").rename(root / "reference" / f"{key}_0.png")
        picture(root / "reference" / f"{key}_1.png")
    scan = scan_folders(config(root))
    problem = only_problem(scan)
    assert "6 references with numbers (000_0.png, 000_1.png, 001_0.png, …)" in problem
    assert "reference_dirs" in problem
    assert not [note for note in scan.notes if "_0.png" in note]


@pytest.mark.parametrize("with_references", [False, True])
def test_numbered_references_beside_the_targets_are_named_once(with_references: bool, root: Path) -> None:
    texts(root / "target", "{}.txt")
    for key in KEYS:
        for number in range(2):
            picture(root / "target" / f"{key}_{number}.png")
        if not with_references:
            (root / "reference" / f"{key}.png").unlink()
    problem = only_problem(scan_folders(config(root)))
    assert "6 pictures numbered like references of the targets beside them (000_0.png, 000_1.png" in problem


def test_targets_that_only_look_numbered_are_used(root: Path) -> None:
    texts(root / "target", "{}.txt")
    for part in ("target", "reference"):
        picture(root / part / "000_1.png")
    (root / "target" / "000_1.txt").write_text("its own")
    assert captions(scan_folders(config(root))) == {**EDITS, "000_1": ("its own",)}


Write = Callable[[Path], None]
ROWS = [{"image": f"target/{key}.png", "prompt": f"edit {key}", "edit_image": f"reference/{key}.png"} for key in KEYS]
TABLES: dict[str, tuple[str, str, str]] = {
    "metadata.csv": (
        "image,prompt,edit_image\n" + "".join(",".join(row.values()) + "\n" for row in ROWS),
        *("csv", "image"),
    ),
    "metadata.json": (json.dumps(ROWS), "jsonl", "image"),
    "metadata.jsonl": (
        "".join(json.dumps({"file_name": row["image"], "prompt": row["prompt"]}) + "\n" for row in ROWS),
        *("jsonl", "file_name"),
    ),
}


@pytest.mark.parametrize("place", ["", "target/"])
@pytest.mark.parametrize("name", TABLES)
def test_a_table_in_place_of_texts_is_named_with_its_settings_and_they_work(name: str, place: str, root: Path) -> None:
    text, strategy, column = TABLES[name]
    (root / place / name).write_text(text)
    problem = only_problem(scan_folders(config(root)))
    file = name if place else f"../{name}"
    assert f"set caption_strategy to {strategy}, caption_file to {file!r}, filename_column to {column!r}" in problem
    assert problem.endswith("and caption_column to 'prompt'.")
    settings = config(root, strategy, caption_file=file, filename_column=column, caption_column="prompt")
    scan = scan_folders(settings)
    assert captions(scan) == EDITS
    assert [
        note
        for note in scan.notes
        if "rows that name their target with the folder before it: 3. The folder (target) is ignored" in note
    ]


@pytest.mark.parametrize(
    "begin",
    ["target/", "./target/", "/home/me/set/target/", "C:\\set\\target\\", "\\\\nas\\set\\target\\", "set/target/"],
)
def test_rows_with_the_folder_before_the_file_are_read(begin: str, root: Path) -> None:
    rows = [{"filename": f"{begin}{key}.png", "caption": f"edit {key}"} for key in KEYS]
    (root / "target" / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert captions(scan_folders(config(root, "jsonl", caption_file="table.jsonl"))) == EDITS


def test_rows_of_another_folder_are_named_once(root: Path) -> None:
    rows = [{"filename": f"/other/place/{key}.png", "caption": f"edit {key}"} for key in KEYS]
    (root / "target" / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problem = only_problem(scan_folders(config(root, "jsonl", caption_file="table.jsonl")))
    assert "rows that name their target in another folder: 3 (/other/place/000, /other/place/001" in problem
    assert problem.endswith("such as 000.")


def test_rows_of_two_folders_are_not_mixed(root: Path) -> None:
    rows = [{"filename": f"{begin}/target/000.png", "caption": begin} for begin in ("a", "b")]
    (root / "target" / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    scan = scan_folders(config(root, "jsonl", caption_file="table.jsonl"))
    assert not scan.dataset.pairs


def test_a_row_of_the_target_itself_wins(root: Path) -> None:
    rows = [{"filename": f"{begin}{key}", "caption": begin or key} for begin in ("", "target/") for key in KEYS]
    (root / "target" / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = captions(scan_folders(config(root, "jsonl", caption_file="table.jsonl")))
    assert found == {key: (key,) for key in KEYS}
