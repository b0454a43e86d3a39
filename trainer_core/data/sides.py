"""Recognises folders whose sides are probably swapped: the targets are the references, and the other way round."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..config import DatasetConfig
from ..text import shown, some_of
from .folders import Folder
from .layouts import AFTER_WORDS, BEFORE_WORDS, SWAPPED, ending_of

_ADVICE = (
    f"{SWAPPED} The references are the pictures before the edit. If they are swapped, exchange the folders (Swap all "
    "in the side panel Edit pairs). If not, go on."
)


def swapped_note(target: Folder, references: Sequence[Folder], config: DatasetConfig) -> str:
    """A sentence that says why the folders are probably swapped; "" if nothing suggests it.

    Captions beside the references are left to `layouts.recognise` where captions are read from texts.
    """
    for folder in references[:1]:
        if _is_called(target.root, BEFORE_WORDS) and _is_called(folder.root, AFTER_WORDS):
            return f"The targets are in {shown(target.root)} and the references in {shown(folder.root)}. {_ADVICE}"
        before = _ending_keys(target.pictures, is_target=False)
        after = _ending_keys(folder.pictures, is_target=True)
        if before and 2 * len(before) > len(target.pictures) and 2 * len(after) > len(folder.pictures):
            return (
                f"The targets are named like references ({some_of(before)}) and the references like targets "
                f"({some_of(after)}). {_ADVICE}"
            )
        if captions_beside_references(target, folder) and config.caption_strategy != "textfile":
            return f"Captions lie beside the references ({some_of(sorted(folder.pictures))}). {_ADVICE}"
    return ""


def captions_beside_references(target: Folder, reference: Folder) -> bool:
    """Whether a text lies beside each reference and beside no target."""
    is_captioned = reference.pictures and reference.texts.keys() >= reference.pictures.keys()
    return bool(is_captioned) and not target.texts.keys() & target.pictures.keys()


def _is_called(folder: Path, words: Iterable[str]) -> bool:
    """Whether a folder is called like this, also in the plural or with a number, as in reference_1 or targets."""
    return folder.name.lower().rstrip("_-. 0123456789").removesuffix("s") in words


def _ending_keys(keys: Iterable[str], *, is_target: bool) -> list[str]:
    endings = {key: ending_of(key) for key in sorted(keys)}
    return [key for key, ending in endings.items() if ending and ending.word and ending.is_target is is_target]
