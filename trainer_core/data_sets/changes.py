"""Changes to a data set that add no pictures: captions, partners, sides, marks, removal and its undoing.

All functions must be called inside `moves.changing`. What a change removes goes to the data set's trash.
"""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from ..data.folders import CAPTION_SUFFIXES, Folder, scan_folder
from ..errors import DatasetError
from ..files import write_atomically
from ..text import LONGEST_PROMPT, is_blank, shown, some_of, text_problem
from .folders import HELD_OUT, TRASH, DataSet, NotFoundError
from .moves import Move, check_folders, move_all
from .names import REFERENCES, SIDES, is_path_of_names, same_stem
from .reading import caption_of, read_held_out

TOKEN = re.compile(r"[0-9a-f]{16}")
_REPLACED = re.compile(r"\.before\.[a-z]+$")  # a caption that another one from the trash has replaced


def write_captions(data_set: DataSet, captions: Mapping[Any, Any]) -> None:
    """Write the caption of each key. An empty one removes the caption file. Files that are unchanged aren't written.

    Raises:
        DatasetError: a key has no target, or a caption can't be used; nothing is written then.
        DiskError: a file can't be written.
    """
    target = scan_folder(data_set.folder("target"))
    unknown = [str(key) for key in captions if key not in target.pictures]
    if unknown:
        raise NotFoundError(f"There are no targets named {some_of(unknown)}. Reload the page.")
    for key, text in captions.items():
        if not isinstance(text, str):
            raise DatasetError(f"The caption of {shown(key)} must be a text.")
        if problem := text_problem(text, LONGEST_PROMPT):
            raise DatasetError(f"The caption of {shown(key)} {problem}.")
    unreadable = [key for key in captions if key in target.texts and _read(target.texts[key]) is None]
    _to_trash(data_set, [target.texts[key] for key in unreadable])
    for key, text in captions.items():
        path = target.texts.get(key)
        if is_blank(text):
            if path is not None and key not in unreadable:
                path.unlink(missing_ok=True)
        elif path is None or key in unreadable:
            write_caption(data_set, target.pictures[key].with_suffix(".txt"), text)
        elif _read(path) != text.strip():
            write_caption(data_set, path, text)


def write_caption(data_set: DataSet, path: Path, text: str) -> None:
    """Write a caption file of the data set atomically.

    Raises:
        DatasetError: its folder or the file itself is a link.
        DiskError: it can't be written.
    """
    check_folders(data_set, path)
    if path.is_symlink():
        raise DatasetError(f"{shown(path.name)} is a link, so nothing is written there.")
    write_atomically(path, f"{text.strip()}\n".encode())


def write_caption_of_all(data_set: DataSet, text: str) -> str:
    """Give every target the same caption. Returns the token that restores the captions before, or an empty text.

    One that all targets had before is changed in place, like the caption of one pair, and doesn't go to the trash.

    Raises:
        DatasetError: the caption can't be used.
        DiskError: a file can't be written.
    """
    if problem := text_problem(text, LONGEST_PROMPT):
        raise DatasetError(f"The caption {problem}.")
    target = scan_folder(data_set.folder("target"))
    before = {key: _read(target.texts[key]) if key in target.texts else "" for key in target.pictures}
    is_shared = None not in before.values() and len(set(before.values())) == 1
    replaced = [target.texts[key] for key, old in before.items() if old not in ("", text.strip())]
    token = "" if is_shared and not is_blank(text) else _to_trash(data_set, replaced)
    if not is_blank(text):
        write_captions(data_set, dict.fromkeys(target.pictures, text))
    return token


def match(data_set: DataSet, pairs: Sequence[tuple[str, str, str]]) -> None:
    """Make pairs (side and file of a reference, file of a target): each reference gets the name of its target.

    A reference that has that name already gets a free one, so it is without a partner afterwards.

    Raises:
        DatasetError: a picture occurs twice, or a file can't be renamed; nothing is changed then.
        NotFoundError: there is no such picture.
    """
    targets = scan_folder(data_set.folder("target"))
    keys = {path.relative_to(targets.root).as_posix(): key for key, path in targets.pictures.items()}
    if len({(side, file) for side, file, _ in pairs}) < len(pairs) or len({(s, t) for s, _, t in pairs}) < len(pairs):
        raise DatasetError("Each picture can have only one partner.")
    first: list[Move] = []
    second: list[Move] = []
    for side in dict.fromkeys(side for side, _, _ in pairs):
        folder = scan_folder(data_set.folder(side)) if side in REFERENCES else None
        if folder is None or side not in data_set.sides:
            raise NotFoundError("There is no such reference. Reload the page.")
        _match_side(data_set, side, folder, {file: _known(keys, t) for s, file, t in pairs if s == side}, first, second)
    move_all(data_set, [first, second])


def _match_side(
    data_set: DataSet, side: str, folder: Folder, wanted: Mapping[str, str], first: list[Move], second: list[Move]
) -> None:
    """Adds the renames of one side: every picture to a name in the trash, then to its new name."""
    place, token = data_set.folder(side).name, secrets.token_hex(8)
    files = {path.relative_to(folder.root).as_posix(): key for key, path in folder.pictures.items()}
    new = {file: key for file, key in wanted.items() if _known(files, file) != key}
    left = {same_stem(key) for file, key in files.items() if file not in new}
    for file, key in list(files.items()):
        if file not in new and key in new.values():  # it makes room
            new[file] = free_stem(key, left | {same_stem(each) for each in (*wanted.values(), *files.values())})
            left.add(same_stem(new[file]))
    for number, (file, key) in enumerate(new.items()):
        aside = f"{TRASH}/{token}/{place}/{number}{Path(file).suffix}"
        first.append((f"{place}/{file}", aside))
        second.append((aside, f"{place}/{key}{Path(file).suffix}"))


def _known(keys: Mapping[str, str], file: str) -> str:
    if file not in keys:
        raise NotFoundError(f"There is no picture {shown(file)}. Reload the page.")
    return keys[file]


def numbered(stem: str) -> Iterator[str]:
    """`stem`, `stem-2`, `stem-3`, and so on."""
    yield stem
    yield from (f"{stem}-{number}" for number in count(2))


def free_stem(stem: str, taken: set[str]) -> str:
    """The first of the `numbered` stems whose `same_stem` is not taken."""
    return next(candidate for candidate in numbered(stem) if same_stem(candidate) not in taken)


def swap_sides(data_set: DataSet, keys: Sequence[str] | None, captions_back: Collection[str] = ()) -> list[str]:
    """Exchange target and first reference of these pairs, or of all.

    A caption stays beside the target. One that lies beside the reference alone comes along with its picture; the keys
    of these are returned. To undo the swap, give them as `captions_back`.

    Raises:
        NotFoundError: a key has no such pair.
        DatasetError: a file can't be renamed; nothing is changed then.
    """
    target, reference = (scan_folder(data_set.folder(side)) for side in ("target", "reference"))
    both = target.pictures.keys() & reference.pictures.keys()
    if missing := sorted(set(keys or ()) - both):
        raise NotFoundError(f"There are no pairs named {some_of(missing)}. Reload the page.")
    there, here = target.root.name, reference.root.name
    aside = f"{TRASH}/{secrets.token_hex(8)}/{there}"
    phases: tuple[list[Move], list[Move], list[Move]] = ([], [], [])
    came: list[str] = []
    for key in sorted(both if keys is None else set(keys)):
        old, new = target.pictures[key], reference.pictures[key]
        target_name = old.relative_to(target.root).with_suffix("").as_posix()
        reference_name = new.relative_to(reference.root).with_suffix("").as_posix()
        phases[0].append((f"{there}/{target_name}{old.suffix}", f"{aside}/{target_name}{old.suffix}"))
        phases[1].append((f"{here}/{reference_name}{new.suffix}", f"{there}/{target_name}{new.suffix}"))
        phases[2].append((f"{aside}/{target_name}{old.suffix}", f"{here}/{reference_name}{old.suffix}"))
        text = target.texts.get(key)
        if text is None and (other := reference.texts.get(key)) is not None:
            name = other.relative_to(reference.root).as_posix()
            phases[1].append((f"{here}/{name}", f"{there}/{target_name}{other.suffix}"))
            came.append(key)
        elif text is not None and key in captions_back and key not in reference.texts:
            name = text.relative_to(target.root).as_posix()
            phases[1].append((f"{there}/{name}", f"{here}/{reference_name}{text.suffix}"))
        elif text is not None and text.stem == old.name and old.suffix != new.suffix:  # 000.png.txt
            name = text.relative_to(target.root).as_posix()
            phases[2].append((f"{there}/{name}", f"{there}/{target_name}{text.suffix}"))
    move_all(data_set, phases)
    return came


def hold_out(data_set: DataSet, keys: Sequence[str], *, held_out: bool) -> None:
    """Mark pairs as held out, or remove the mark. Marks of pictures that are gone are kept.

    Raises:
        NotFoundError: a key has no target.
        DatasetError: the list is a link, or can't be read.
        DiskError: the list can't be written.
    """
    target = scan_folder(data_set.folder("target"))
    missing = sorted(set(keys) - target.pictures.keys())
    if missing and held_out:
        raise NotFoundError(f"There are no targets named {some_of(missing)}. Reload the page.")
    before = read_held_out(data_set)
    after = before | set(keys) if held_out else before - set(keys)
    path = data_set.root / HELD_OUT
    if path.is_symlink():
        raise DatasetError(f"{HELD_OUT} is a link, so nothing is written there.")
    if after != before:
        write_atomically(path, "".join(f"{key}\n" for key in sorted(after)).encode())


def delete(data_set: DataSet, pictures: Sequence[tuple[str, str]]) -> str:
    """Move pictures (side, file) to the trash, targets with their captions. Returns the token that restores them.

    Raises:
        NotFoundError: there is no such picture.
        DatasetError: a file can't be moved; nothing is changed then.
    """
    target = scan_folder(data_set.folder("target"))
    texts = {target.pictures[key]: path for key, path in target.texts.items() if key in target.pictures}
    paths: dict[Path, None] = {}
    for side, file in pictures:
        data_set.picture(side, file)  # refuses what is not there
        path = data_set.sides[side] / file  # a link, and not the picture that it leads to
        paths[path] = None
        if path in texts:
            paths[texts[path]] = None
    return _to_trash(data_set, list(paths))


def _to_trash(data_set: DataSet, paths: Sequence[Path]) -> str:
    """Move files to a new folder in the trash. Returns its name; empty if there is nothing to move."""
    if not paths:
        return ""
    token = secrets.token_hex(8)
    names = [path.relative_to(data_set.root).as_posix() for path in paths]
    move_all(data_set, [[(name, f"{TRASH}/{token}/{name}") for name in names]])
    return token


def restore(data_set: DataSet, token: object) -> int:
    """Move the files of a removal back, and return their number. If a name is taken, a picture gets a number.

    A caption then goes with its picture. Otherwise a present caption changes places with the one in the trash.

    Raises:
        NotFoundError: there is no such removal, or it was restored already.
        DatasetError: a file can't be moved; nothing is changed then.
    """
    folder = data_set.root / TRASH / str(token)
    if not isinstance(token, str) or not TOKEN.fullmatch(token) or not folder.is_dir():
        raise NotFoundError("This removal can't be undone: its files are no longer in the trash.")
    check_folders(data_set, folder / "x")
    files = restorable(data_set, folder)
    if not files:
        raise NotFoundError("This removal was undone already.")
    first: list[Move] = []
    second: list[Move] = []
    renamed: dict[str, str] = {}
    taken: dict[str, set[str]] = {}
    for name in sorted(files, key=_is_text):
        place, _, rest = name.partition("/")
        stem, suffix = rest[: len(rest) - len(Path(rest).suffix)], Path(rest).suffix
        kept, own = f"{TRASH}/{token}/{name}", f"{place}/{stem}"
        if not _is_text(name):
            stems = taken.setdefault(place, _stems(data_set.root / place))
            stem = free_stem(stem, stems)
            stems.add(same_stem(stem))
            renamed[own] = f"{place}/{stem}"
        elif own in renamed:
            stem = renamed[own].partition("/")[2]
        new = f"{place}/{stem}{suffix}"
        if os.path.lexists(data_set.root / new):
            first.append((new, f"{kept}.before{suffix}"))
        second.append((kept, new))
    move_all(data_set, [first, second])
    return len(files)


def restorable(data_set: DataSet, folder: Path) -> list[str]:
    """The files of a removal, whose folder in the trash this is, that `restore` moves back: paths below the folder."""
    places = {*SIDES, *(side.name for side in data_set.sides.values())}
    return [name for name in _files_in(folder) if name.partition("/")[0] in places]


def _files_in(folder: Path) -> Iterator[str]:
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            name = Path(place, file).relative_to(folder).as_posix()
            if "/" in name and is_path_of_names(name) and not _REPLACED.search(file):
                yield name


def _stems(folder: Path) -> set[str]:
    return {same_stem(key) for key in scan_folder(folder).pictures} if folder.is_dir() else set()


def _is_text(name: str) -> bool:
    return Path(name).suffix.lower() in CAPTION_SUFFIXES


def _read(path: Path) -> str | None:
    """The caption in a file; None if it can't be read."""
    try:
        return caption_of(path)
    except DatasetError:
        return None
