"""Notes on what is done to the pictures of a dataset: conversion to sRGB, transparency on white, masks from alpha."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ..config.dataset import ColorProfiles
from ..text import some_of
from .checking import Checked


class _Remark(NamedTuple):
    """Which pictures a note is about, and what that means for them."""

    pictures: str
    meaning: str = ""


def picture_notes(checked: Mapping[Path, Checked], color_profiles: ColorProfiles) -> Iterator[str]:
    """One note for each thing that is done to pictures, with their number and the first names."""
    files: dict[_Remark, list[str]] = defaultdict(list)
    soft: list[str] = []
    for path, picture in checked.items():
        for remark in _remarks(picture, color_profiles):
            files[remark].append(f"{path.parent.name}/{path.name}")
        if picture.spread is not None and picture.spread.is_soft:
            soft.append(
                f"{path.parent.name}/{path.name}: weights {picture.spread.low:.2f} to {picture.spread.high:.2f}"
            )
    if soft:
        yield (
            f"Masks with many grey pixels: {len(soft)} ({some_of(soft)}). Grey counts in proportion to its brightness. "
            "The mean weight is 1; the numbers leave out the darkest and the brightest tenth of the pixels. If a file "
            "is a photo, put a mask in its place."
        )
    for remark, names in files.items():
        yield f"{remark.pictures}: {len(names)} ({some_of(names)}). {remark.meaning}".rstrip()


def profile_note(pictures: Mapping[str, Sequence[Checked]]) -> Iterator[str]:
    """The pairs whose pictures have different colour profiles. `pictures`: by pair key, the target and references."""
    keys = [key for key, each in pictures.items() if len({picture.profile for picture in each}) > 1]
    if keys:
        yield (
            f"Pairs whose target and references have different colour profiles: {len(keys)} ({some_of(keys)}). With "
            "color_profiles convert, all become sRGB; with ignore, the difference in colour is learned."
        )


def _remarks(picture: Checked, color_profiles: ColorProfiles) -> Iterator[_Remark]:
    if picture.animated:
        yield _Remark("Pictures with several frames", "Only the first frame is used.")
    if picture.mask == "hole":
        yield _Remark("Masks read from their transparency", "Transparent parts count, as in ComfyUI's mask editor.")
    elif picture.mask == "paint":
        yield _Remark("Masks read from the opacity of their only colour", "Painted parts count.")
    if picture.mask:
        return
    if picture.transparent:
        yield _Remark(
            "Pictures with transparent parts",
            "They are trained on white. ComfyUI's LoadImage shows the hidden colours there instead, so save them "
            "without transparency.",
        )
    if picture.profile is None:
        return
    name, problem = picture.profile
    if problem:
        yield _Remark(f"Pictures with a colour profile that can't be used ({problem})", "They are treated as sRGB.")
    elif color_profiles == "convert":
        yield _Remark(f"Pictures converted from {name} to sRGB")
    else:
        yield _Remark(f"Pictures in {name} that are not converted to sRGB, because color_profiles is ignore")
