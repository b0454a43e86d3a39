"""Drift: how far a sampled picture shifts, scales or changes colour against its target outside the edited region.

An edit LoRA should leave the rest of the picture unchanged. Drift hardly shows in the loss or the PSNR. Misaligned
pairs, wrong preprocessing or overtraining raise it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ..data.alignment import UNEDITED, Pixels, Where, align
from ..geometry import Size, same_framing

_SIDE = 512  # longest side at which pictures are measured
_LEAST_SHARE = 0.1  # with a smaller unedited share of the picture, all of it is compared


@dataclass(frozen=True, slots=True)
class Drift:
    """Absolute drift: `shift` in pixels of the sampled picture, `zoom` in percent, and `colour` in 8-bit steps of the
    worst channel."""

    shift: float
    zoom: float
    colour: float

    def as_text(self) -> str:
        """The three values with their units."""
        return f"{self.shift:.2f} px, {self.zoom:.2f} %, {self.colour:.1f} of 255"


def unedited_region(target: Image.Image, references: Sequence[Image.Image]) -> Where | None:
    """The region where the target equals its first reference with the same framing; None if that can't be measured."""
    wanted = _pixels(target)
    for reference in references:
        if not same_framing(Size(*target.size), Size(*reference.size)):
            continue
        found = align(wanted, _pixels(reference, wanted.shape))
        region = found.difference < UNEDITED
        return region if found.measured and region.mean() >= _LEAST_SHARE else None
    return None


def measure_drift(sampled: Image.Image, target: Image.Image, unedited: Where | None) -> Drift | None:
    """Drift of a sampled picture of any size against its target. `unedited` comes from `unedited_region`.

    None if the two have too little in common to be aligned, for example early in training.
    """
    wanted = _pixels(target)
    found = align(wanted, _pixels(sampled, wanted.shape), unedited)
    if not found.measured:
        return None
    scale = sampled.width / wanted.shape[1]  # from measured pixels to pixels of the sampled picture
    return Drift(
        shift=math.hypot(*found.shift) * scale,
        zoom=abs(found.zoom - 1) * 100,
        colour=max(map(abs, found.colour)),
    )


def mean_drift(drifts: Iterable[Drift | None]) -> Drift | None:
    """The mean of the measured drifts; None if there are none."""
    found = [drift for drift in drifts if drift is not None]
    if not found:
        return None
    return Drift(*(sum(getattr(each, name) for each in found) / len(found) for name in Drift.__slots__))


def _pixels(picture: Image.Image, shape: tuple[int, ...] | None = None) -> Pixels:
    """[H, W, 3] in 0..255, resized to `shape` or else to at most _SIDE pixels on the longest side."""
    scale = min(1.0, _SIDE / max(picture.size))
    size = (shape[1], shape[0]) if shape else (round(picture.width * scale), round(picture.height * scale))
    return np.asarray(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), dtype=np.float32)
