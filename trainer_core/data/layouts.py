"""Recognises folders that were made for other trainers, and says in one line what to move, rename or set.

What can be read without doubt is read: `.caption` files and `000.png.txt` by `folders`, and tables that name files with
the folder before them by `rows_by_target`.
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..config import DatasetConfig
from ..errors import ConfigError
from ..json_text import parse_json, read_json
from ..text import counted, printable, shown, some_of
from .caption_table import CaptionTable, key_of
from .folders import CAPTION_SUFFIXES, Folder, unread_names

# How references and targets are called: as the ending of a name, 000_0 and 000_1 (musubi-tuner), 000_start, 000_start2
# and 000_end (fal), or as the name of a folder.
BEFORE_WORDS = ("reference", "before", "source", "control", "input", "original", "start")
_SHORT_BEFORE = ("src", "in", "orig", "ref", "cond", "r")
AFTER_WORDS = ("target", "after", "output", "edited", "result", "end")
_SHORT_AFTER = ("out", "edit", "t")
_BEFORE = re.compile(
    f"(_(?P<place>[0-9])|[-_ .](?P<word>{'|'.join((*BEFORE_WORDS, *_SHORT_BEFORE))})[-_ .]?(?P<number>[0-9]?))$",
    re.IGNORECASE,
)
_AFTER = re.compile(f"[-_ .](?P<word>{'|'.join((*AFTER_WORDS, *_SHORT_AFTER))})$", re.IGNORECASE)
SWAPPED = "Are the two folders swapped?"
_CAPTION_FOLDERS = ("caption", "captions", "text", "texts", "txt", "prompt", "prompts", "instruction", "instructions")
_TEXT_SUFFIXES = frozenset(
    {".json", ".md", ".text", ".prompt", ".tags", ".yaml", ".yml", ".rtf", ".doc", ".docx", ".odt", ".html"}
)
_TABLES = (".csv", ".jsonl", ".json")
_TABLE_NAMES = ("metadata", "captions")  # looked at first
_MOST_TABLES = 20  # files that are opened to see whether they are tables of captions
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
    references and captions that are missing because of it, so that they need no lines of their own. `notes` say what is
    read all the same.
    """

    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    no_reference: set[tuple[Path, str]] = field(default_factory=set)
    no_caption: set[str] = field(default_factory=set)


class Ending(NamedTuple):
    """How a name ends: `bare` is the name without the ending, and `word` is in lower case.

    `number` counts references: 2 for 000_start2. For 000_0 and the like, `word` is empty and `number` the digit.
    """

    bare: str
    word: str
    number: int
    is_target: bool


def ending_of(name: str) -> Ending | None:
    """The ending that says whether a picture is a reference or a target; None if the name has none."""
    if found := _AFTER.search(name):
        return Ending(name[: found.start()], found["word"].lower(), 1, is_target=True) if found.start() else None
    found = _BEFORE.search(name)
    if found is None or not found.start():
        return None
    number = int(found["place"] or found["number"] or 1)
    return Ending(name[: found.start()], (found["word"] or "").lower(), number, is_target=False)


def recognise(
    target: Folder, references: Sequence[Folder], config: DatasetConfig, masks: Folder | None = None
) -> Layout:
    """What another trainer's layout explains, and what all targets lack. Takes references out of the targets."""
    layout = Layout()
    _references_beside_targets(target, references, config, layout)
    for folder in references:
        _references_with_endings(target, folder, layout)
        _no_matches(target, folder, "reference", layout, optional=config.references_optional)
    if masks is not None:
        _no_matches(target, masks, "mask", layout, optional=False)
    if config.caption_strategy == "textfile":
        _captions_elsewhere(target, references, layout)
        _table_instead_of_texts(target, layout)
        _no_captions(target, layout)
    return layout


def captions_elsewhere(target: Folder, references: Sequence[Folder]) -> list[str]:
    """Problems that say where the captions of targets without one probably are; empty if nothing suggests a place."""
    layout = Layout()
    _captions_elsewhere(target, references, layout)
    _table_instead_of_texts(target, layout)
    return layout.problems


class _Partner(NamedTuple):
    """The keys of a reference and a target that are named alike except for endings, and the reference's ending."""

    key: str
    target: str
    ending: str


def _partners(keys: Iterable[str], target: Folder) -> list[_Partner]:
    """The keys that end like a reference of a target: 000_0 or 000_start for 000 or 000_end."""
    by_name = {_AFTER.sub("", key): key for key in target.pictures} | {key: key for key in target.pictures}
    found = ((key, _BEFORE.search(key)) for key in sorted(keys))
    named = ((key, key[: ending.start()], ending[0]) for key, ending in found if ending)
    return [_Partner(key, by_name[name], ending) for key, name, ending in named if name in by_name]


def _references_beside_targets(
    target: Folder, references: Sequence[Folder], config: DatasetConfig, layout: Layout
) -> None:
    """000_0.png beside the target 000.png, or 000_start.png beside 000_end.png.

    Such a picture has neither a caption nor references of its own.
    """
    if (config.references_optional or not config.reference_dirs) and config.caption_strategy != "textfile":
        return  # they may be targets without references
    found = [
        each
        for each in _partners(target.pictures, target)
        if each.key not in target.texts and not any(each.key in folder.pictures for folder in references)
    ]
    if not found:
        return
    names = [target.pictures.pop(each.key).relative_to(target.root).as_posix() for each in found]
    _explain(found, target, references, layout)
    layout.problems.append(
        f"{shown(target.root)}: {counted(len(names), 'picture')} named like references of the targets beside them "
        f"({some_of(names)}). {_places(found) or 'Put them into a reference folder'}, and {_without_endings(found)}"
    )


def _references_with_endings(target: Folder, folder: Folder, layout: Layout) -> None:
    """000_0 or 000_start in a reference folder for the target 000 or 000_end, or 000 for the target 000_end."""
    bare = {_AFTER.sub("", key): key for key in target.pictures if _AFTER.search(key)}
    found = _partners(folder.pictures.keys() - target.pictures.keys(), target)
    found += [_Partner(key, bare[key], "") for key in sorted(folder.pictures.keys() & bare.keys())]
    found = [each for each in found if each.key not in target.pictures and each.target not in folder.pictures]
    if not found:
        return
    names = [folder.pictures.pop(each.key).relative_to(folder.root).as_posix() for each in found]
    _explain(found, target, [folder], layout)
    places, without = _places(found), _without_endings(found)
    advice = f"{places}, and {without}" if places else f"{without[0].upper()}{without[1:]}"
    layout.problems.append(
        f"{shown(folder.root)}: {counted(len(names), 'reference')} named like targets except for an ending "
        f"({some_of(names)}). {advice}"
    )


def _no_matches(target: Folder, folder: Folder, kind: str, layout: Layout, *, optional: bool) -> None:
    """A folder in which no picture is named like a target."""
    lacking = sorted(target.pictures)
    found = [path.relative_to(folder.root).as_posix() for path in folder.pictures.values()]
    explained = any(root == folder.root for root, _ in layout.no_reference)
    if explained or len(lacking) < 2 or target.pictures.keys() & folder.pictures.keys() or not folder.root.is_dir():
        return
    if optional and not found:
        return
    layout.no_reference |= {(folder.root, key) for key in lacking}
    there = f"it has no pictures. Put one {kind} for each target there, with its name."
    if found:
        there = f"it has {some_of(found)}. Name each {kind} like its target{folder.almost(lacking[0])}."
    elif folder.unread:
        there = f"it only has formats that are not supported ({unread_names(folder)}). Convert them to PNG or JPEG."
    layout.problems.append(
        f"{shown(folder.root)}: no target has a {kind} here; looked for {some_of(lacking)} with a picture extension, "
        f"but {there}"
    )


def _explain(found: Sequence[_Partner], target: Folder, references: Sequence[Folder], layout: Layout) -> None:
    """Note what these targets lack because of the names: references, and captions that are named without the ending."""
    for each in found:
        layout.no_reference |= {(folder.root, each.target) for folder in references}
        bare = _AFTER.sub("", each.target)
        if each.target not in target.texts and bare in target.texts:
            layout.no_caption.add(each.target)
            del target.texts[bare]


def _places(found: Sequence[_Partner]) -> str:
    """Which references go to which folder, if a target has several; empty if each has only one."""
    if len({each.target for each in found}) == len(found):
        return ""
    first, *others = (shown(ending) for ending in sorted({each.ending for each in found} - {""}))
    places = "".join(f", those ending in {ending} into another" for ending in others)
    return f"Put the references ending in {first} into one reference folder{places}"


def _without_endings(found: Sequence[_Partner]) -> str:
    name = _AFTER.sub("", found[0].target)
    return f"remove the endings, so that target, reference and caption have the same name, such as {shown(name)}."


def _captions_elsewhere(target: Folder, references: Sequence[Folder], layout: Layout) -> None:
    """Captions in another folder or another format, such as captions/000.txt or 000.json."""
    beside = {key: path for key, path in _text_files(target) if path.suffix.lower() not in CAPTION_SUFFIXES}
    places = [("beside them", beside)]
    places += [(f"in {shown(folder.root)}", dict(_text_files(folder))) for folder in references]
    if _without_caption(target, layout):
        places += [(f"in {shown(root)}", files) for root, files in _caption_folders(target)]
    for number, (place, files) in enumerate(places):
        keys = sorted(_without_caption(target, layout) & files.keys())
        if not keys:
            continue
        swapped = 1 <= number <= len(references) and len(keys) == len(target.pictures)  # all are beside the references
        hint = f"{SWAPPED} Then exchange them. Otherwise, if" if swapped else "If"
        names = [files[key].name for key in keys]
        plain = all(files[key].suffix.lower() in CAPTION_SUFFIXES for key in keys)
        move = "move them beside the targets"
        if not plain:
            move = f"save each as text beside its target, such as {shown(keys[0])}.txt"
        layout.no_caption.update(keys)
        layout.problems.append(
            f"{shown(target.root)}: {counted(len(keys), 'target')} {'has' if len(keys) == 1 else 'have'} no caption. "
            f"Files {place} have their names ({some_of(names)}). {hint} these are the edit instructions, {move}."
        )


def _text_files(folder: Folder) -> Iterator[tuple[str, Path]]:
    """Files that may hold captions, by the key of the picture that they are named after; plain texts last."""
    for path in folder.others:
        if path.suffix.lower() in _TEXT_SUFFIXES:
            yield key_of(path.relative_to(folder.root).with_suffix("").as_posix()), path
    yield from folder.texts.items()


def _caption_folders(target: Folder) -> Iterator[tuple[Path, dict[str, Path]]]:
    """Folders with text files that may hold captions, below and beside the target folder, and the folder above it."""
    below: dict[str, Path] = {}
    for key, path in _text_files(target):
        bare = "/".join(part for part in key.split("/") if part.lower() not in _CAPTION_FOLDERS)
        if bare != key:
            below[bare] = path
    if below:
        yield next(iter(below.values())).parent, below
    above = target.root.parent
    beside = [
        Path(each)
        for each in _listed(above)
        if each.name.lower() in _CAPTION_FOLDERS and each.name != target.root.name
        if each.is_dir(follow_symlinks=False)
    ]
    for folder in (*beside, above):
        files = [Path(each) for each in _listed(folder) if each.is_file(follow_symlinks=False)]
        texts = [path for path in files if path.suffix.lower() in CAPTION_SUFFIXES | _TEXT_SUFFIXES]
        texts.sort(key=lambda path: path.suffix.lower() in CAPTION_SUFFIXES)  # plain texts last, as in `_text_files`
        yield folder, {key_of(path.stem): path for path in texts}


def _listed(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as listing:
            return sorted(listing, key=lambda entry: entry.name)
    except OSError:  # the folder above the targets may be closed to us
        return []


def _table_instead_of_texts(target: Folder, layout: Layout) -> None:
    """A table of captions in the target folder or above it, while captions are expected in texts."""
    keys = _without_caption(target, layout)
    if not keys:
        return
    listed = [Path(each) for place in (target.root, target.root.parent) for each in _listed(place)]
    tables = sorted((path for path in listed if path.suffix in _TABLES), key=lambda path: path.stem not in _TABLE_NAMES)
    found = ((path, columns) for path in tables[:_MOST_TABLES] if (columns := _columns(path)))
    for path, (file_column, caption_column) in found:
        layout.no_caption.update(keys)
        strategy = "csv" if path.suffix == ".csv" else "jsonl"
        file = printable(Path(os.path.relpath(path, target.root)).as_posix())
        layout.problems.append(
            f"{shown(target.root)}: {counted(len(keys), 'target')} without a caption, but {shown(path)} looks like a "
            f"table of captions. To use it, set caption_strategy to {strategy}, caption_file to {file!r}, "
            f"filename_column to {file_column!r} and caption_column to {caption_column!r}."
        )
        return


def _no_captions(target: Folder, layout: Layout) -> None:
    """No target has a caption, and no other layout explains it: one line in place of one per target."""
    keys = _without_caption(target, layout)
    if len(keys) < max(2, len(target.pictures)):
        return
    layout.no_caption.update(keys)
    layout.problems.append(
        f"{shown(target.root)}: none of the {len(keys):,} targets has a caption. One text for all: set "
        "caption_strategy to instanceprompt and write it into instance_prompt. One text each: write a file beside each "
        f"target, such as {shown(min(keys))}.txt."
    )


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


def rows_by_target(rows: CaptionTable, target: Folder, config: DatasetConfig, layout: Layout) -> CaptionTable:
    """The rows of a caption table by target. Adds problems and notes about rows that name their target otherwise.

    A row may name its file with the folder before it (target/000.png, also as an absolute path) if all such rows have
    the same beginning.
    """
    file = shown(config.captions.caption_file)
    parts = {key: tuple(_below(key, target)) for key in rows if key not in target.pictures}
    beginnings = {begin for found in parts.values() for begin, _ in found}
    moved: dict[str, str] = {}
    if len(beginnings) == 1:
        moved = {key: found[0][1] for key, found in parts.items() if found and found[0][1] not in rows}
    if moved:
        layout.notes.append(
            f"{file}: rows that name their target with the folder before it: {len(moved)}. The folder "
            f"({shown(beginnings.pop())}) is ignored."
        )
    rows = {moved.get(key, key): captions for key, captions in rows.items()}
    missing = target.pictures.keys() - rows.keys()
    elsewhere = {rest: row for row in rows for rest in _endings(row) if rest in missing}
    if elsewhere:
        layout.no_caption.update(elsewhere)
        layout.problems.append(
            f"{file}: rows that name their target in another folder: {len(elsewhere)} "
            f"({some_of(sorted(elsewhere.values()))}). Write the path below the target folder instead, such as "
            f"{shown(min(elsewhere))}."
        )
    unused = [row for row in rows if row not in target.pictures]
    if unused:
        layout.notes.append(f"Rows of {file} without a target, not used: {len(unused)} ({some_of(unused)}).")
    return rows


def _below(key: str, target: Folder) -> Iterator[tuple[str, str]]:
    """The beginning that ends in the name of the target folder, and the target after it, if there is one."""
    parts = key.split("/")
    for place, part in enumerate(parts[:-1], 1):
        rest = "/".join(parts[place:])
        if part == target.root.name and rest in target.pictures:
            yield "/".join(parts[:place]), rest


def _endings(row: str) -> Iterator[str]:
    parts = row.split("/")
    return ("/".join(parts[place:]) for place in range(1, len(parts)))
