"""Pairs from pictures in memory: written to a folder named by their content, then read like any other dataset."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from ..config import CaptionConfig, DatasetConfig
from ..errors import DatasetError
from ..events import SILENT, Observer, watched
from ..files import clean_leftovers, remove, rename, temporary_beside
from ..text import is_blank, text_problem
from .pairing import EditDataset, pair_folders


def pair_pictures(
    targets: Sequence[Image.Image],
    references: Sequence[Sequence[Image.Image]],
    captions: Sequence[str],
    root: Path,
    *,
    observer: Observer = SILENT,
) -> EditDataset:
    """Pair target i with picture i of each reference set and with caption i. A single caption applies to all pairs.

    Writes the pictures (RGB) as PNG files to a folder below `root`, named by their content. The folder appears only
    once it is complete.

    Raises:
        DatasetError: the counts differ or a caption is empty; lists all problems.
        Interrupted: the observer asked to stop.
    """
    captions = list(captions) * len(targets) if len(captions) == 1 else list(captions)
    if problems := _problems(targets, references, captions):
        raise DatasetError("These pictures can't be paired. Fix the problems below and run again:", problems)
    sets = {"target": targets} | {f"reference_{number}": each for number, each in enumerate(references, 1)}
    folder = root / _content(sets, captions, observer)
    clean_leftovers(root)
    if not folder.is_dir():
        _write(folder, sets, captions, observer)
    dirs = tuple(str(folder / name) for name in sets)
    whole = CaptionConfig(disable_multiline_split=True)
    return pair_folders(DatasetConfig(target_dir=dirs[0], reference_dirs=dirs[1:], captions=whole), observer)


def _problems(
    targets: Sequence[Image.Image], references: Sequence[Sequence[Image.Image]], captions: Sequence[str]
) -> list[str]:
    count = len(targets)
    problems = [] if count else ["target has no pictures. Connect at least one."]
    problems += [
        f"reference_{number} has {len(each)} pictures, but target has {count}. Give one reference per target, in order."
        for number, each in enumerate(references, 1)
        if len(each) != count
    ]
    if len(captions) != count:
        problems.append(
            f"There are {len(captions)} captions for {count} targets. Give one caption for all or one per target."
        )
    empty = [str(number) for number, caption in enumerate(captions) if is_blank(caption)]
    if empty:
        problems.append(
            f"These captions are empty: {', '.join(empty[:20])} (counted from 0). Describe the edit in each of them."
        )
    problems += [
        f"Caption {number} (counted from 0) {problem}. Correct it."
        for number, caption in enumerate(captions)
        if (problem := text_problem(caption))
    ]
    return problems


def _content(sets: dict[str, Sequence[Image.Image]], captions: Sequence[str], observer: Observer) -> str:
    digest = hashlib.sha256(repr([list(sets), list(captions)]).encode())
    for pictures in sets.values():
        for picture in watched(pictures, observer):
            digest.update(f"{picture.mode} {picture.size}".encode())
            digest.update(picture.tobytes())
    return digest.hexdigest()[:32]


def _write(folder: Path, sets: dict[str, Sequence[Image.Image]], captions: Sequence[str], observer: Observer) -> None:
    temporary = temporary_beside(folder)
    try:
        for name, pictures in sets.items():
            (temporary / name).mkdir(parents=True)
            for number, picture in enumerate(watched(pictures, observer)):
                picture.save(temporary / name / f"{number:05d}.png", compress_level=1)
        for number, caption in enumerate(captions):
            (temporary / "target" / f"{number:05d}.txt").write_text(caption, encoding="utf-8")
        if not folder.is_dir():  # another process may have written the same pairs meanwhile
            rename(temporary, folder)
    finally:
        remove(temporary)
