"""Drift: how far a drawn picture moved, grew or changed colour against its target outside the edited region.

A LoRA of an edit should leave the rest of the picture where it is. What it does to it hardly shows in the loss or the
PSNR; measured, it is a number that pairs out of line, a wrong preprocessing or too long a training raise.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..conditioning.pictures import same_framing
from ..data.alignment import UNEDITED, Pixels, Where, align
from ..geometry import Size

_SIDE = 512  # pictures are measured at this longer side at most
_LEAST_SHARE = 0.1  # of the picture that is unedited; with less, all of it is compared


@dataclass(frozen=True, slots=True)
class Drift:
    """`shift` in pixels of the drawn picture, `zoom` in percent, `colour` in 8-bit steps of the worst channel; without
    signs."""

    shift: float
    zoom: float
    colour: float

    def as_text(self) -> str:
        """For people."""
        return f"{self.shift:.2f} px, {self.zoom:.2f} %, {self.colour:.1f} of 255"


def unedited_region(target: Image.Image, references: Sequence[Image.Image]) -> Where | None:
    """Where a target still shows its first reference of the same framing; None where that can't be told."""
    wanted = _pixels(target)
    for reference in references:
        if not same_framing(Size(*target.size), Size(*reference.size)):
            continue
        found = align(wanted, _pixels(reference, wanted.shape))
        region = found.difference < UNEDITED
        return region if found.measured and region.mean() >= _LEAST_SHARE else None
    return None


def measure_drift(drawn: Image.Image, target: Image.Image, unedited: Where | None) -> Drift | None:
    """Of a drawn picture against its target at any size; `unedited` is that of `unedited_region`.

    None where the two have too little in common to be compared, as with a model that has not learned anything yet.
    """
    wanted = _pixels(target)
    found = align(wanted, _pixels(drawn, wanted.shape), unedited)
    if not found.measured:
        return None
    to_drawn = drawn.width / wanted.shape[1]
    return Drift(
        shift=math.hypot(*found.shift) * to_drawn,
        zoom=abs(found.zoom - 1) * 100,
        colour=max(map(abs, found.colour)),
    )


def mean_drift(drifts: Iterable[Drift | None]) -> Drift | None:
    """Over those that could be measured."""
    found = [drift for drift in drifts if drift is not None]
    if not found:
        return None
    return Drift(*(sum(getattr(each, name) for each in found) / len(found) for name in Drift.__slots__))


def _pixels(picture: Image.Image, shape: tuple[int, ...] | None = None) -> Pixels:
    """[H, W, 3] in 0..255 at most _SIDE pixels long, or of a shape."""
    scale = min(1.0, _SIDE / max(picture.size))
    size = (shape[1], shape[0]) if shape else (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
