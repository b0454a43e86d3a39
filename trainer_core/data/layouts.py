"""Recognises folders that were made for other trainers, and says what to move, rename or set.

What can be read without doubt is read: `.caption` files and `000.png.txt` by `folders`, and tables that name files with
the folder before them by `rows_by_target`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from os.path import relpath
from pathlib import Path
from typing import Any

from ..config import DatasetConfig
from ..errors import ConfigError
from ..json_text import parse_json, read_json
from ..text import counted, printable, shown, some_of
from .folders import Folder

_NUMBERED = re.compile(r"(?P<target>.+)_(?P<number>[0-9])")  # references of musubi-tuner: 000_0.png, 000_1.png
_TABLES = ("metadata.csv", "metadata.jsonl", "metadata.json", "captions.csv", "captions.jsonl", "captions.json")
_FILE_COLUMNS = (
    "file_name",
    "filename",
    "file",
    "image",
    "image_path",
    "target",
    "target_image",
    "edited_image",
    "path",
)
_CAPTION_COLUMNS = ("prompt", "caption", "text", "instruction", "edit_prompt", "edit_instruction")
_BEGINNING = 1 << 16  # bytes of a table that are enough for its first row


@dataclass(slots=True)
class Layout:
    """What is laid out differently.

    `problems` has one line for each kind of difference. `no_reference` (folder, key) and `no_caption` (key) are the
    references and captions that are missing because of it, so that they need no lines of their own.
    """

    problems: list[str] = field(default_factory=list)
    no_reference: set[tuple[Path, str]] = field(default_factory=set)
    no_caption: set[str] = field(default_factory=set)


def recognise(target: Folder, references: Sequence[Folder], config: DatasetConfig) -> Layout:
    """What another trainer's layout explains. Takes references out of the targets."""
    layout = Layout()
    _numbered_beside_targets(target, references, config, layout)
    for folder in references:
        _numbered_references(target, folder, layout)
    if config.caption_strategy == "textfile":
        _captions_beside_references(target, references, layout)
        _table_instead_of_texts(target, layout)
    return layout


def _numbered_beside_targets(
    target: Folder, references: Sequence[Folder], config: DatasetConfig, layout: Layout
) -> None:
    """000_0.png and 000_1.png beside the target 000.png, with neither a caption nor references of their own."""
    if config.references_optional and config.caption_strategy != "textfile":
        return  # they may be targets without references
    beside = [
        key
        for key, bare in _numbered(target.pictures)
        if bare in target.pictures
        and key not in target.texts
        and not any(key in folder.pictures for folder in references)
    ]
    if not beside:
        return
    names = [target.pictures.pop(key).relative_to(target.root).as_posix() for key in beside]
    for _, bare in _numbered(beside):
        layout.no_reference |= {(folder.root, bare) for folder in references}
    layout.problems.append(
        f"{shown(target.root)}: {counted(len(names), 'picture')} numbered like references of the targets beside "
        f"them ({some_of(names)}). Move them to reference folders, those ending in _0 to one folder and those ending "
        "in _1 to the next, and name each like its target."
    )


def _numbered_references(target: Folder, folder: Folder, layout: Layout) -> None:
    """000_0.png and 000_1.png in a reference folder, for the target 000.png."""
    found = [
        (key, bare)
        for key, bare in _numbered(folder.pictures)
        if bare in target.pictures and bare not in folder.pictures and key not in target.pictures
    ]
    if not found:
        return
    names = [folder.pictures.pop(key).relative_to(folder.root).as_posix() for key, _ in found]
    layout.no_reference |= {(folder.root, bare) for _, bare in found}
    layout.problems.append(
        f"{shown(folder.root)}: {counted(len(names), 'reference')} with numbers ({some_of(names)}), but a reference "
        "folder holds one reference per target. Put those ending in _0 into one folder and those ending in _1 into "
        "the next, name each like its target, and list the folders in reference_dirs."
    )


def _numbered(keys: Iterable[str]) -> list[tuple[str, str]]:
    """The keys that end in a number, and each without it."""
    return [(key, found["target"]) for key in sorted(keys) if (found := _NUMBERED.fullmatch(key))]


def _captions_beside_references(target: Folder, references: Sequence[Folder], layout: Layout) -> None:
    for folder in references:
        keys = [key for key in sorted(_without_caption(target, layout)) if key in folder.texts]
        if keys:
            names = [folder.texts[key].relative_to(folder.root).as_posix() for key in keys]
            layout.no_caption.update(keys)
            layout.problems.append(
                f"{shown(target.root)}: {counted(len(keys), 'target')} without a caption, but {shown(folder.root)} has "
                f"texts with these names ({some_of(names)}). If these are the edit instructions, move them beside the "
                "targets."
            )


def _table_instead_of_texts(target: Folder, layout: Layout) -> None:
    """A table of captions in the target folder or above it, while captions are expected in texts."""
    keys = _without_caption(target, layout)
    places = (place / name for place in (target.root, target.root.parent) for name in _TABLES)
    found = ((path, columns) for path in places if keys and (columns := _columns(path)))
    for path, (file_column, caption_column) in found:
        layout.no_caption.update(keys)
        strategy = "csv" if path.suffix == ".csv" else "jsonl"
        layout.problems.append(
            f"{shown(target.root)}: {counted(len(keys), 'target')} without a caption, but {shown(path)} looks like a "
            f"table of captions. To use it, set caption_strategy to {strategy}, caption_file to "
            f"{printable(Path(relpath(path, target.root)).as_posix())!r}, filename_column to {file_column!r} and "
            f"caption_column to {caption_column!r}."
        )
        return


def _without_caption(target: Folder, layout: Layout) -> set[str]:
    return target.pictures.keys() - target.texts.keys() - layout.no_caption


def _columns(path: Path) -> tuple[str, str] | None:
    """The columns of file names and captions of a table; None if this is no such table."""
    try:
        first = _first_row(path) if path.is_file() else {}
    except (OSError, ValueError, csv.Error):  # also ConfigError and UnicodeDecodeError
        return None
    names = first if isinstance(first, dict) else {}
    files, captions = (
        next((name for name in wanted if name in names), None) for wanted in (_FILE_COLUMNS, _CAPTION_COLUMNS)
    )
    return (files, captions) if files and captions else None


def _first_row(path: Path) -> Any:
    if path.suffix == ".json":
        rows = read_json(path, finite=False)
        return rows[0] if isinstance(rows, list) and rows else {}
    with path.open("rb") as file:
        line = file.readline(_BEGINNING).decode("utf-8-sig")
    if path.suffix == ".csv":
        return dict.fromkeys(next(csv.reader([line]), []))
    return parse_json(line, path.name, finite=False, error=ConfigError)


def rows_by_target(
    rows: dict[str, tuple[str, ...]], target: Folder, config: DatasetConfig
) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The rows of a caption table by target, and notes.

    A row may name its file with the folder before it (target/000.png, also as an absolute path) if all such rows have
    the same beginning.
    """
    elsewhere = [key for key in rows if key not in target.pictures]
    parts = {key: tuple(_below(key, target)) for key in elsewhere}
    beginnings = {begin for found in parts.values() for begin, _ in found}
    if len(beginnings) != 1:
        return rows, []
    moved = {key: found[0][1] for key, found in parts.items() if found and found[0][1] not in rows}
    if not moved:
        return rows, []
    begin = next(iter(beginnings))
    note = (
        f"{shown(config.captions.caption_file)}: rows that name their target with the folder before it: {len(moved)}. "
        f"The folder ({shown(begin)}) is ignored."
    )
    return {moved.get(key, key): captions for key, captions in rows.items()}, [note]


def _below(key: str, target: Folder) -> Iterator[tuple[str, str]]:
    """The beginning that ends in the name of the target folder, and the target after it, if there is one."""
    parts = key.split("/")
    for place, part in enumerate(parts[:-1], 1):
        rest = "/".join(parts[place:])
        if part == target.root.name and rest in target.pictures:
            yield "/".join(parts[:place]), rest


def rows_of_other_folders(rows: Iterable[str], target: Folder, config: DatasetConfig, layout: Layout) -> None:
    """Name the rows whose file has the name of a target without a row, but is below another folder."""
    missing = target.pictures.keys() - set(rows)
    found = {rest: row for row in rows for rest in _endings(row) if rest in missing}
    if found:
        layout.no_caption.update(found)
        layout.problems.append(
            f"{shown(config.captions.caption_file)}: rows that name their target in another folder: {len(found)} "
            f"({some_of(sorted(found.values()))}). Write the path below the target folder instead, such as "
            f"{shown(min(found))}."
        )


def _endings(row: str) -> Iterator[str]:
    parts = row.split("/")
    return ("/".join(parts[place:]) for place in range(1, len(parts)))
