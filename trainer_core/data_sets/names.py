"""Names of data sets and files that come from pages and ZIP files, and what they say about a picture's place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..data.folders import CAPTION_SUFFIXES, is_system_name
from ..data.images import PICTURE_SUFFIXES
from ..data.layouts import AFTER_WORDS, BEFORE_WORDS, Ending, ending_of
from ..disk import MAX_NAME_BYTES, is_device_name
from ..errors import DatasetError
from ..settings import is_plain_name
from ..text import brief, shown, text_problem

REFERENCES = ("reference", "reference_2", "reference_3")
SIDES = (*REFERENCES, "target")
AUTO = "auto"  # the side follows from the name
_STEM_BYTES = 120  # leaves room for numbers, extensions and the names of temporary files
_NOT_IN_NAMES = re.compile(r'[<>:"/\\|?*]')
_SIDE = re.compile(
    f"((?P<before>{'|'.join(BEFORE_WORDS)})|(?P<after>{'|'.join(AFTER_WORDS)}))s?([-_ ]?(?P<number>[1-3]))?"
)


def is_one_name(name: str) -> bool:
    """Whether this can be the name of one visible file or folder, on every system and without leading elsewhere."""
    if not name or name[0] == "." or name[-1] in ". " or text_problem(name, MAX_NAME_BYTES):
        return False
    return not re.search(r"[/\\:]", name) and not any(unicodedata.category(c) == "Cc" for c in name)


def is_path_of_names(path: str) -> bool:
    """Whether this is a name, or several separated by slashes, all of them as for `is_one_name`."""
    return all(map(is_one_name, path.split("/")))


def checked_new_name(name: object) -> str:
    """`name`, if a new data set may have it.

    Raises:
        DatasetError: the name is not allowed.
    """
    fits = isinstance(name, str) and is_plain_name(name) and not is_device_name(name)
    if not isinstance(name, str) or not fits or len(name.encode()) > 200 or is_system_name(name):
        raise DatasetError(
            f"A data set's name can't be {brief(name)}. Use 1 to 100 letters, digits, spaces and _ - + . ( ). Start "
            "with a letter, digit or _. Don't end with a dot or space. Names that Windows reserves, such as CON, are "
            "not allowed."
        )
    return name


def clean_stem(stem: str) -> str:
    """A file name without extension that is valid on every system, as much like `stem` as possible."""
    stem = unicodedata.normalize("NFC", stem.encode("utf-8", "ignore").decode())
    stem = "".join(c for c in stem if unicodedata.category(c) not in ("Cc", "Cf"))  # also what turns the reading order
    stem = _NOT_IN_NAMES.sub("_", stem).strip(" .")
    stem = stem.encode()[:_STEM_BYTES].decode("utf-8", "ignore").rstrip(" .") or "picture"
    return f"_{stem}" if is_device_name(stem) else stem


def same_stem(stem: str) -> str:
    """A stem for comparison: stems that are equal on some system are equal here."""
    return unicodedata.normalize("NFC", stem).casefold()


class SideName(NamedTuple):
    """The side that a folder's name stands for. Lower `rank` is the more usual name of it."""

    side: str
    rank: tuple[int, str]


def side_of_folder(name: str) -> SideName | None:
    """The side that a folder is named after, such as before, control_2 or outputs; None if it is named otherwise."""
    found = _SIDE.fullmatch(name.lower())
    if found is None:
        return None
    number = int(found["number"] or 1)
    if found["after"]:
        return SideName("target", (AFTER_WORDS.index(found["after"]), name)) if number == 1 else None
    return SideName(REFERENCES[number - 1], (BEFORE_WORDS.index(found["before"]), name))


class Place(NamedTuple):
    """Where a file belongs: its side, and its name without extension and ending, not cleaned yet."""

    side: str
    stem: str
    suffix: str
    is_text: bool


def places_of(names: Sequence[str], side: str = AUTO) -> list[Place | str]:
    """For each file name, which may have folders before it, its place, or a sentence that says why it has none.

    With AUTO, the side follows from the folder that the file is in, or from the ending of its name. 000_0 and 000_1 are
    reference and target, or two references if the same files also have a picture 000. Texts are captions, and belong to
    targets. A sentence is empty for files of the operating system.
    """
    parts = [_parts(name) for name in names]
    bare = {stem for *_, file in parts for stem, suffix in [_split(file)] if suffix in PICTURE_SUFFIXES}
    return [_place(folders, file, side, bare) for *folders, file in parts]


def _parts(name: str) -> list[str]:
    parts = [part for part in re.split(r"[/\\]", name.replace("\0", "")) if part.strip(" .")]
    return parts or [""]


def _split(file: str) -> tuple[str, str]:
    """Stem, and extension in lower case. The stem of 000.png.txt is 000."""
    path = Path(file)
    stem, suffix = path.stem, path.suffix.lower()
    if suffix in CAPTION_SUFFIXES and Path(stem).suffix.lower() in PICTURE_SUFFIXES:
        stem = Path(stem).stem
    return stem, suffix


def _place(folders: Sequence[str], file: str, side: str, bare: set[str]) -> Place | str:
    if not file or any(is_system_name(part) for part in (*folders, file)):
        return ""
    stem, suffix = _split(file)
    is_text = suffix in CAPTION_SUFFIXES
    if not is_text and suffix not in PICTURE_SUFFIXES:
        return f"{shown(file)}: this is not the extension of a picture that can be read. Convert it to PNG or JPEG."
    ending = ending_of(stem)
    if side != AUTO:
        if ending is not None and ending.word in (BEFORE_WORDS, AFTER_WORDS)[side == "target"]:
            stem = ending.bare
        return Place("target" if is_text else side, stem, suffix, is_text)
    named = [(number, each.side) for number, part in enumerate(folders) if (each := side_of_folder(part))]
    if named:
        number, found = named[-1]
        stem = "_".join([*folders[number + 1 :], stem])
        return Place("target" if is_text else found, stem, suffix, is_text)
    if ending is None:
        if is_text:
            return Place("target", stem, suffix, is_text)
        return _by_others(stem, suffix, bare) or (
            f"{shown(file)}: its name doesn't say whether it shows the picture before or after the edit. End it with "
            "_before or _after, or add it to one side."
        )
    found = "target" if is_text else _side_of(ending, bare)
    if not found:
        return f"{shown(file)}: at most three references of a pair are used. It was not added."
    return Place(found, ending.bare, suffix, is_text)


def _side_of(ending: Ending, bare: set[str]) -> str:
    """The side by an ending; empty for a fourth reference or later."""
    if ending.is_target:
        return "target"
    if ending.word:
        return REFERENCES[ending.number - 1] if 1 <= ending.number <= len(REFERENCES) else ""
    if ending.bare in bare:  # 000, with the references 000_0, 000_1 and 000_2
        return REFERENCES[ending.number] if ending.number < len(REFERENCES) else ""
    return ("reference", "target")[ending.number] if ending.number < 2 else ""


def _by_others(stem: str, suffix: str, bare: set[str]) -> Place | None:
    """A picture without an ending is the target of pictures that are named like it with the ending of a reference."""
    endings = (ending_of(other) for other in bare)
    mine = [ending for ending in endings if ending is not None and ending.bare == stem]
    if any(not ending.is_target for ending in mine):
        return Place("target", stem, suffix, is_text=False)
    return Place("reference", stem, suffix, is_text=False) if mine else None
