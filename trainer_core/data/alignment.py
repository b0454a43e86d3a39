"""Measure shift, zoom and colour offset between a reference and its target, ignoring the edited region.

Phase correlation (Kuglin & Hines, 1975) gives a coarse shift. Gauss-Newton steps refine shift and zoom, from coarse to
fine. Geman-McClure weights fade where the pictures disagree, so that the edit itself hardly counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d, grid_sample

Pixels: TypeAlias = NDArray[np.float32]  # values in 0..255
Where: TypeAlias = NDArray[np.bool_]  # [H, W]
T = TypeVar("T", bound=np.generic)

UNEDITED = 8.0  # differences below this many 8-bit steps count as noise or compression, not as an edit
_STEPS = 12  # of Gauss-Newton at each size, at most
_LINEAR_STEPS = 3
_SMALL_STEP = 5e-3  # pixels; the last step
_SAMPLED = 24  # rows and columns of a plane that give its median
_LEAST_SIDE = 48  # pixels of the smallest pictures that are compared
_FARTHEST = 20.0  # residuals above this many 8-bit steps count as an edit
MIN_UNEDITED_SHARE = 0.2
_LARGEST_OFFSET = 64.0  # 8-bit steps; regions that lie further apart in colour are edited, such as a negative's sky
_MAX_STANDARD_ERROR = 0.1  # of the shift, in pixels of the measured picture


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the reference lies relative to its target.

    `shift` is in pixels to the right and down, `zoom` is the reference's scale (1: equal), and `colour` is target minus
    reference per channel in 8-bit steps. `difference` [H, W] is what remains after alignment, in 8-bit steps;
    `unedited` is the share of the overlap where little remains, 0 if the colours lie far apart. `measured` is False if
    the result is not reliable.
    """

    shift: tuple[float, float]
    zoom: float
    colour: tuple[float, float, float]
    unedited: float
    difference: Pixels
    measured: bool


@dataclass(slots=True)
class _State:
    shift: NDArray[np.float64]
    zoom: float = 0.0


class _Level(NamedTuple):
    """Target and reference as planes [3, H, W] at one size, and the part to compare."""

    target: Pixels
    reference: Pixels
    where: Where


def align(target: Pixels, reference: Pixels, where: Where | None = None) -> Alignment:
    """Measure a reference against its target. Both are [H, W, 3] in 0..255 and have the same size.

    `where` selects the part of the target to compare; None compares all of it.
    """
    where = np.ones(target.shape[:2], np.bool_) if where is None else where
    levels = [_Level(_planes(target), _planes(reference), where)]
    while min(levels[-1].where.shape) >= 2 * _LEAST_SIDE and len(levels) < 4:
        above = levels[-1]
        levels.append(_Level(_halved(above.target), _halved(above.reference), _halved_where(above.where)))
    fine = phase_shift(levels[0].target.mean(axis=0), levels[0].reference.mean(axis=0)) / 2 ** (len(levels) - 1)
    state = _best_start(levels[-1], fine)
    error = math.inf
    for number, level in enumerate(reversed(levels)):
        if number:
            state.shift = state.shift * 2
        error = _refine(level, state)
    aligned, inside = _warped(levels[0], state)
    residual, colour = _residual(levels[0].target - aligned, inside)
    return judged(residual, inside, colour, where, error, shift=state.shift, zoom=1 + state.zoom)


def judged(
    residual: Pixels,
    inside: Where,
    colour: Pixels,
    where: Where,
    error: float,
    *,
    shift: NDArray[np.float64],
    zoom: float,
) -> Alignment:
    """The alignment that leaves this residual [3, H, W] `inside`, with the standard error of its shift in pixels."""
    smooth = avg_pool2d(torch.from_numpy(_largest(residual) * inside)[None, None], 3, 1, 1)[0, 0].numpy()
    compared = where & inside
    is_alike = compared.any() and float(np.abs(colour).max()) <= _LARGEST_OFFSET
    unedited = float((smooth < UNEDITED)[compared].mean()) if is_alike else 0.0
    overlaps = bool(compared.sum() >= where.sum() / 2)
    return Alignment(
        shift=(float(shift[0]), float(shift[1])),
        zoom=zoom,
        colour=(float(colour[0]), float(colour[1]), float(colour[2])),
        unedited=unedited,
        difference=smooth,
        measured=overlaps and unedited >= MIN_UNEDITED_SHARE and error <= _MAX_STANDARD_ERROR,
    )


def estimate(target: Pixels, reference: Pixels) -> tuple[Alignment, float]:
    """Shift and zoom of a reference that lies within a fraction of a pixel, and the standard error of its shift.

    Solves for both from the slopes at a quarter of the target's pixels and resamples nothing. Much faster than
    `align`, but wrong for larger shifts. Both pictures are [H, W, 3] in 0..255.
    """
    wanted = _planes(target)
    residual, inside = wanted - _planes(reference), np.ones(target.shape[:2], np.bool_)
    slopes, half = _slopes(wanted)
    thin, found, error = (..., slice(None, None, 2), slice(None, None, 2)), np.zeros(3), math.inf
    some, there, slope = residual[thin], inside[thin], np.ascontiguousarray(slopes[thin])
    for _ in range(_LINEAR_STEPS):
        left, _ = _residual(some - np.tensordot(found.astype(np.float32), slope, 1), there)
        step, error = _step(slope, left, there)
        found += step
        if np.abs(step).max() < _SMALL_STEP:
            break
    left, colour = _residual(residual - np.tensordot(found.astype(np.float32), slopes, 1), inside)
    return judged(left, inside, colour, inside, error, shift=found[:2], zoom=1 + found[2] / half), error


def _planes(pixels: Pixels) -> Pixels:
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _halved(planes: Pixels) -> Pixels:
    return avg_pool2d(torch.from_numpy(planes)[None], 2)[0].numpy()


def _halved_where(where: Where) -> Where:
    pooled = avg_pool2d(torch.from_numpy(where.astype(np.float32))[None], 2)
    return pooled[0].numpy() > 0.5


def _best_start(level: _Level, fine: NDArray[np.float64]) -> _State:
    """The best-fitting start: no shift, the full-resolution phase correlation `fine`, or that of these pictures."""
    coarse = phase_shift(level.target.mean(axis=0), level.reference.mean(axis=0))
    starts = [_State(shift) for shift in (np.zeros(2), fine, coarse)]
    return min(starts, key=lambda state: _cost(level, state))


def _cost(level: _Level, state: _State) -> float:
    aligned, inside = _warped(level, state)
    residual, _ = _residual(level.target - aligned, inside)
    return float(np.minimum(np.abs(residual), _FARTHEST)[:, inside].mean()) if inside.any() else _FARTHEST


def phase_shift(target: NDArray[np.float32], reference: NDArray[np.float32]) -> NDArray[np.float64]:
    """Shift (right, down) of `reference` relative to `target`, both grey [H, W], in whole pixels.

    Looks no farther than an eighth of each side.
    """
    height, width = target.shape
    window = np.outer(np.hanning(height), np.hanning(width))
    spectra = [np.fft.rfft2((picture - picture.mean()) * window) for picture in (reference, target)]
    cross = spectra[0] * spectra[1].conj()
    peak = np.fft.irfft2(cross / np.maximum(np.abs(cross), 1e-9), (height, width))
    down = (np.arange(height) + height // 2) % height - height // 2
    right = (np.arange(width) + width // 2) % width - width // 2
    near = (np.abs(down) <= height // 8)[:, None] & (np.abs(right) <= width // 8)[None]
    row, column = np.unravel_index(np.argmax(np.where(near, peak, -np.inf)), peak.shape)
    return np.array([right[column], down[row]], dtype=np.float64)


def _residual(difference: Pixels, inside: Where) -> tuple[Pixels, Pixels]:
    """Target minus aligned reference [3, H, W] without the colour offset, and the offset [3].

    The offset is the median where the pictures nearly agree. A sample of the pixels gives it.
    """
    some, there = _sample(difference), _sample(inside)
    colour = _middle(some[:, there]) if there.any() else np.zeros(3, np.float32)
    near = there & (_largest(some - colour[:, None, None]) < _FARTHEST)
    if near.any():
        colour = _middle(some[:, near])
    return difference - colour[:, None, None], colour


def _middle(values: NDArray[T]) -> NDArray[T]:
    """The median of the last axis, the upper one of two. Several times faster than numpy's for so few values."""
    half = values.shape[-1] // 2
    return np.partition(values, half, axis=-1)[..., half]


def _sample(planes: NDArray[T]) -> NDArray[T]:
    """Every n-th row and column, so that about _SAMPLED² of each plane are left."""
    apart = max(1, min(planes.shape[-2:]) // _SAMPLED)
    return planes[..., ::apart, ::apart]


def _largest(planes: Pixels) -> Pixels:
    """The largest absolute value of the three channels, [H, W]."""
    red, green, blue = np.abs(planes)
    return np.maximum(np.maximum(red, green), blue)


def _warped(level: _Level, state: _State) -> tuple[Pixels, Where]:
    """The reference resampled onto the target, and the region of the compared part that it covers."""
    x, y = _from_centre(level.reference)
    height, width = level.where.shape
    right = (x * (1 + state.zoom) + state.shift[0]) / (width / 2)
    down = (y * (1 + state.zoom) + state.shift[1]) / (height / 2)
    inside = (np.abs(right) <= 1 - 3 / width) & (np.abs(down) <= 1 - 3 / height) & level.where
    grid = torch.from_numpy(np.stack(np.broadcast_arrays(right, down), axis=-1).astype(np.float32))[None]
    picture = torch.from_numpy(level.reference)[None]
    aligned = grid_sample(picture, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return aligned[0].numpy(), inside


def _from_centre(planes: Pixels) -> tuple[Pixels, Pixels]:
    """Column [1, W] and row [H, 1] coordinates in pixels from the centre."""
    height, width = planes.shape[1:]
    x, y = np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2
    return x.astype(np.float32)[None], y.astype(np.float32)[:, None]


def _slopes(planes: Pixels) -> tuple[Pixels, float]:
    """How much the values change [3, 3, H, W], and the distance of the farthest side from the centre in pixels.

    The changes are those for a shift of a pixel to the right, for one down, and for a zoom that moves that side by a
    pixel.
    """
    x, y = _from_centre(planes)
    half = max(planes.shape[1:]) / 2
    down, right = np.gradient(planes, axis=(1, 2))
    return np.stack([right, down, right * (x / half) + down * (y / half)]), half


def _step(slopes: Pixels, residual: Pixels, inside: Where) -> tuple[NDArray[np.float64], float]:
    """A Gauss-Newton step (right, down, zoom in pixels of the farthest side), and the standard error of the shift."""
    there = _sample(residual)[:, _sample(inside)]
    typical = float(_middle(np.abs(there).ravel())) if there.size else 0.0  # a narrow region may hold no sampled pixel
    scale = min(max(2.0, 1.5 * typical), _FARTHEST / 2)
    weight = inside / (1 + (residual / scale) ** 2) ** 2
    weighted = (slopes * weight).reshape(3, -1)
    normal = (weighted @ slopes.reshape(3, -1).T).astype(np.float64) + 1e-3 * np.eye(3)
    step = np.linalg.solve(normal, (weighted @ residual.ravel()).astype(np.float64))
    return np.clip(step, -2, 2), float(scale * math.sqrt(np.linalg.inv(normal)[:2, :2].diagonal().max()))


def _refine(level: _Level, state: _State) -> float:
    """Refine `state` in place by Gauss-Newton on shift and zoom. Returns the shift's standard error in pixels."""
    error = math.inf
    for _ in range(_STEPS):
        aligned, inside = _warped(level, state)
        if not inside.any():
            return math.inf
        slopes, half = _slopes(aligned)
        step, error = _step(slopes, _residual(level.target - aligned, inside)[0], inside)
        state.shift = state.shift + step[:2]
        state.zoom += float(step[2]) / half
        if np.abs(step).max() < _SMALL_STEP:
            break
    return error
