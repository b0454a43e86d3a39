"""Layouts of other trainers: what can be read is read, and the rest is named in one line with the way on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from trainer_core.config import CaptionConfig, DatasetConfig
from trainer_core.data.pairing import FolderScan, folder_state, pair_folders, scan_folders
from trainer_core.errors import DatasetError

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
    assert "3 targets have no caption. " in problem and "000.txt, 001.txt, 002.txt" in problem
    assert problem.endswith("move them beside the targets.")


def test_numbered_references_in_their_folder_are_named_once(root: Path) -> None:
    texts(root / "target", "{}.txt")
    for key in KEYS:
        (root / "reference" / f"{key}.png").rename(root / "reference" / f"{key}_0.png")
        picture(root / "reference" / f"{key}_1.png")
    scan = scan_folders(config(root))
    problem = only_problem(scan)
    assert "6 references named like targets except for an ending (000_0.png, 000_1.png, 001_0.png, …)" in problem
    assert "Put the references ending in _0 into one reference folder, those ending in _1 into another" in problem
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
    assert "6 pictures named like references of the targets beside them (000_0.png, 000_1.png, 001_0.png, …)" in problem
    assert "Put the references ending in _0 into one reference folder, those ending in _1 into another, and" in problem


ENDINGS = [
    ("_start", "_end"),
    ("_before", "_after"),
    ("-source", "-target"),
    (".Input", ".Output"),
    ("_in", "_out"),
    (" original", " edited"),
    ("_R", "_T"),
    ("_control", ""),
    ("_reference1", ""),
    ("_0", "_end"),
]


def with_endings(root: Path, before: str, after: str) -> None:
    """Renames the pictures, so that they no longer have the names of their captions."""
    texts(root / "target", "{}.txt")
    for key in KEYS:
        (root / "reference" / f"{key}.png").rename(root / "reference" / f"{key}{before}.png")
        (root / "target" / f"{key}.png").rename(root / "target" / f"{key}{after}.png")


@pytest.mark.parametrize(("before", "after"), ENDINGS)
def test_both_pictures_of_each_pair_in_one_folder_are_named_once(before: str, after: str, root: Path) -> None:
    with_endings(root, before, after)
    for key in KEYS:
        (root / "reference" / f"{key}{before}.png").rename(root / "target" / f"{key}{before}.png")
    scan = scan_folders(config(root))
    problem = only_problem(scan)
    assert problem.startswith(f"{root / 'target'}: 3 pictures named like references of the targets beside them")
    assert (
        f"(000{before}.png, 001{before}.png, 002{before}.png). Put them into a reference folder, and remove" in problem
    )
    assert problem.endswith("the endings, so that target, reference and caption have the same name, such as 000.")
    assert not scan.notes
    one_folder = replace(config(root), reference_dirs=(str(root / "target"),))
    same, *others = scan_folders(one_folder).problems
    assert same.endswith(
        "are the same folder. Put the targets into one folder and the references into another, with the same names."
    )
    assert others == [problem]


@pytest.mark.parametrize(("before", "after"), [*ENDINGS, ("", "_end")])
def test_references_named_with_another_ending_are_named_once(before: str, after: str, root: Path) -> None:
    with_endings(root, before, after)
    scan = scan_folders(config(root))
    problem = only_problem(scan)
    assert f"{root / 'reference'}: 3 references named like targets except for an ending (000{before}.png" in problem
    assert ". Remove the endings, so that target, reference and caption have the same name, such as 000." in problem
    assert not scan.notes
    for part, ending in (("reference", before), ("target", after)):  # what the message says
        for key in KEYS:
            (root / part / f"{key}{ending}.png").rename(root / part / f"{key}.png")
    assert captions(scan_folders(config(root))) == EDITS


def test_several_references_with_endings_are_named_once(root: Path) -> None:
    with_endings(root, "_start", "_end")
    for key in KEYS:
        picture(root / "reference" / f"{key}_start2.png")
    problem = only_problem(scan_folders(config(root)))
    assert "those ending in _start2 into another, and remove the endings" in problem


def test_each_target_has_one_reference_whatever_their_endings(root: Path) -> None:
    """They fit into one folder, though their endings differ."""
    with_endings(root, "_start", "_end")
    (root / "reference" / "001_start.png").rename(root / "reference" / "001_before.png")
    (root / "reference" / "002_start.png").rename(root / "reference" / "002.png")
    problem = only_problem(scan_folders(config(root)))
    assert "(000_start.png, 001_before.png, 002.png). Remove the endings, so that" in problem


def test_targets_that_endings_do_not_explain_get_their_own_lines(root: Path) -> None:
    texts(root / "target", "{}.txt")
    (root / "reference" / "000.png").rename(root / "reference" / "000_start.png")
    for key in KEYS[1:]:
        (root / "reference" / f"{key}.png").unlink()
    first, *others = scan_folders(config(root)).problems
    assert "1 reference named like targets except for an ending (000_start.png)" in first
    assert [each.partition(": there is no reference")[0] for each in others] == [
        str(root / "target" / f"{key}.png") for key in KEYS[1:]
    ]


def test_names_that_only_end_like_it_are_used(root: Path) -> None:
    for part in ("target", "reference"):
        for key in KEYS:
            (root / part / f"{key}.png").rename(root / part / f"{key}_zoom_in.png")
            picture(root / part / f"{key}_zoom_out.png")
    for way in ("in", "out"):
        texts(root / "target", f"{{}}_zoom_{way}.txt")
    assert captions(scan_folders(config(root))) == {
        f"{key}_zoom_{way}": EDITS[key] for key in KEYS for way in ("in", "out")
    }


@pytest.mark.parametrize("place", ["target/captions", "captions", "Texts", "target/prompts", ""])
def test_captions_in_another_folder_are_named_once(place: str, root: Path) -> None:
    (root / place).mkdir(exist_ok=True)
    texts(root / place, "{}.txt")
    problem = only_problem(scan_folders(config(root)))
    assert f"3 targets have no caption. Files in {root / place} have their names (000.txt, 001.txt" in problem
    assert problem.endswith("move them beside the targets.")


@pytest.mark.parametrize("name", ["{}.json", "{}.md", "{}.png.json", "{}.YAML", "{}.docx"])
@pytest.mark.parametrize("place", ["target", "reference", "captions"])
def test_captions_in_another_format_are_named_once(name: str, place: str, root: Path) -> None:
    (root / place).mkdir(exist_ok=True)
    texts(root / place, name)
    problem = only_problem(scan_folders(config(root)))
    where = "beside them" if place == "target" else f"in {root / place}"
    assert f"3 targets have no caption. Files {where} have their names ({name.format('000')}, " in problem
    assert problem.endswith("save each as text beside its target, such as 000.txt.")


@pytest.mark.parametrize("name", ["source_{}", "{}.0", "IMG{}"])
@pytest.mark.parametrize("optional", [False, True])
def test_a_folder_of_which_nothing_is_named_like_a_target_is_named_once(name: str, optional: bool, root: Path) -> None:
    texts(root / "target", "{}.txt")
    for key in KEYS:
        (root / "reference" / f"{key}.png").rename(root / "reference" / f"{name.format(key)}.png")
    scan = scan_folders(replace(config(root), references_optional=optional))
    assert only_problem(scan) == (
        f"{root / 'reference'}: no target has a reference here; looked for 000, 001, 002 with a picture extension, but "
        f"it has {', '.join(name.format(key) + '.png' for key in KEYS)}. Name each reference like its target."
    )


def test_only_the_case_of_all_names_differs(root: Path) -> None:
    for part, change in (("target", str.lower), ("reference", str.upper)):
        for key in KEYS:
            (root / part / f"{key}.png").rename(root / part / f"{change(f'img{key}')}.png")
    texts(root / "target", "img{}.txt")
    problem = only_problem(scan_folders(config(root)))
    assert problem.endswith("Rename IMG000.png or the target, because only the letter case differs.")


def test_an_empty_folder_of_references_or_masks_is_named_once(root: Path) -> None:
    texts(root / "target", "{}.txt")
    (root / "mask").mkdir()
    for key in KEYS:
        (root / "reference" / f"{key}.png").unlink()
    settings = replace(config(root), mask_dir=str(root / "mask"))
    for problem, kind in zip(scan_folders(settings).problems, ("reference", "mask"), strict=True):
        assert problem.startswith(f"{root / kind}: no target has a {kind} here; looked for 000, 001, 002 with")
        assert problem.endswith(f"but it has no pictures. Put one {kind} for each target there, with its name.")
    optional = replace(config(root), references_optional=True)
    assert len(scan_folders(optional).dataset.pairs) == 3, "without references, as wished"


def test_a_folder_of_unsupported_formats_is_named_once(root: Path) -> None:
    texts(root / "target", "{}.txt")
    for key in KEYS:
        (root / "reference" / f"{key}.png").rename(root / "reference" / f"{key}.heic")
    assert only_problem(scan_folders(config(root))).endswith(
        "but it only has formats that are not supported (000.heic, 001.heic, 002.heic). Convert them to PNG or JPEG."
    )
    for key in KEYS:
        (root / "target" / f"{key}.png").rename(root / "target" / f"{key}.JXL")
    assert only_problem(scan_folders(config(root))) == (
        f"{root / 'target'}: this target folder only has formats that are not supported (000.JXL, 001.JXL, 002.JXL). "
        "Convert them to PNG or JPEG."
    )


@pytest.mark.parametrize("name", ["train.jsonl", "target/list.csv", "my pairs.json"])
def test_a_table_of_any_name_is_named(name: str, root: Path) -> None:
    (root / "a.csv").write_text("name,age\n")
    (root / "b.json").write_text("{")
    (root / name).write_text(TABLES[f"metadata{Path(name).suffix}"][0])
    problem = only_problem(scan_folders(config(root)))
    assert f"but {root / name} looks like a table of captions. To use it, set caption_strategy to" in problem


def test_plain_texts_come_before_other_files_of_the_same_name(root: Path) -> None:
    texts(root / "reference", "{}.txt")
    texts(root / "reference", "{}.json")
    assert only_problem(scan_folders(config(root))).endswith("move them beside the targets.")


def test_targets_without_a_caption_that_others_have_are_named_themselves(root: Path) -> None:
    texts(root / "target", "{}.json")
    (root / "target" / "001.json").unlink()
    first, second = scan_folders(config(root)).problems
    assert "2 targets have no caption. Files beside them" in first
    assert second.startswith(f"{root / 'target' / '001.png'}: no caption; looked for 001.txt next to it.")


def test_what_is_not_used_is_told_with_the_problems(root: Path) -> None:
    texts(root / "target", "{}.txt")
    (root / "reference" / "001.png").rename(root / "reference" / "001.heic")
    for number in range(5):
        picture(root / "reference" / f"other{number}.png")
    with pytest.raises(DatasetError) as caught:
        pair_folders(config(root))
    assert len(caught.value.problems) == 1
    heic, others = caught.value.notes
    assert heic.startswith(
        f"{root / 'reference'}: 1 .heic file not used (001.heic), because this format is not supported"
    )
    assert others.endswith(
        "5 pictures not used (other0.png, other1.png, other2.png, …), because no target has this name."
    )
    assert str(caught.value).partition("\nNotes:\n")[2].splitlines() == [f"  - {note}" for note in caught.value.notes]


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
