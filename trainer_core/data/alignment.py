"""Measure shift, zoom and colour offset between a reference and its target, ignoring the edited region.

Phase correlation (Kuglin & Hines, 1975) gives a coarse shift. Gauss-Newton steps refine shift and zoom, from coarse to
fine. Geman-McClure weights fade where the pictures disagree, so that the edit itself hardly counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import avg_pool2d, grid_sample

Pixels: TypeAlias = NDArray[np.float32]  # [H, W, 3] in 0..255
Where: TypeAlias = NDArray[np.bool_]  # [H, W]

UNEDITED = 8.0  # differences below this many 8-bit steps count as noise or compression, not as an edit
_STEPS = 12
_LEAST_SIDE = 48
_FARTHEST = 20.0  # residuals above this many 8-bit steps count as an edit
_MIN_UNEDITED_SHARE = 0.2
_MAX_STANDARD_ERROR = 0.1  # of the shift, in pixels of the measured picture


@dataclass(frozen=True, slots=True)
class Alignment:
    """How the reference lies relative to its target.

    `shift` is in pixels to the right and down, `zoom` is the reference's scale (1: equal), and `colour` is target minus
    reference per channel in 8-bit steps. `difference` [H, W] is what remains after alignment, in 8-bit steps;
    `unedited` is the share of the target where little remains. `measured` is False if the result is not reliable.
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


def align(target: Pixels, reference: Pixels, where: Where | None = None) -> Alignment:
    """Measure a reference against its target. Both are [H, W, 3] in 0..255 and have the same size.

    `where` selects the part of the target to compare; None compares all of it.
    """
    where = np.ones(target.shape[:2], np.bool_) if where is None else where
    levels = [(target, reference, where)]
    while min(levels[-1][0].shape[:2]) >= 2 * _LEAST_SIDE and len(levels) < 4:
        above = levels[-1]
        levels.append((_halved(above[0]), _halved(above[1]), _halved_where(above[2])))
    fine = phase_shift(target.mean(axis=2), reference.mean(axis=2)) / 2 ** (len(levels) - 1)
    state = _best_start(*levels[-1], fine)
    error = math.inf
    for number, (wanted, given, place) in enumerate(reversed(levels)):
        if number:
            state.shift = state.shift * 2
        error = _refine(wanted, given, place, state)
    residual, inside, colour = _residual(target, reference, where, state)
    difference = np.abs(residual).max(axis=2) * inside
    smooth = avg_pool2d(torch.from_numpy(difference)[None, None], 3, 1, 1)[0, 0].numpy()
    unedited = float((smooth < UNEDITED)[where].mean()) if where.any() else 0.0
    return Alignment(
        shift=(float(state.shift[0]), float(state.shift[1])),
        zoom=1 + state.zoom,
        colour=(float(colour[0]), float(colour[1]), float(colour[2])),
        unedited=unedited,
        difference=smooth,
        measured=unedited >= _MIN_UNEDITED_SHARE and error <= _MAX_STANDARD_ERROR,
    )


def _halved(pixels: Pixels) -> Pixels:
    pooled = avg_pool2d(torch.from_numpy(pixels).permute(2, 0, 1)[None], 2)
    return pooled[0].permute(1, 2, 0).contiguous().numpy()


def _halved_where(where: Where) -> Where:
    pooled = avg_pool2d(torch.from_numpy(where.astype(np.float32))[None], 2)
    return pooled[0].numpy() > 0.5


def _best_start(target: Pixels, reference: Pixels, where: Where, fine: NDArray[np.float64]) -> _State:
    """The best-fitting start: no shift, the full-resolution phase correlation `fine`, or that of these pictures."""
    coarse = phase_shift(target.mean(axis=2), reference.mean(axis=2))
    starts = [_State(shift) for shift in (np.zeros(2), fine, coarse)]
    return min(starts, key=lambda state: _cost(target, reference, where, state))


def _cost(target: Pixels, reference: Pixels, where: Where, state: _State) -> float:
    residual, inside, _ = _residual(target, reference, where, state)
    return float(np.minimum(np.abs(residual), _FARTHEST)[inside].mean()) if inside.any() else _FARTHEST


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


def _residual(target: Pixels, reference: Pixels, where: Where, state: _State) -> tuple[Pixels, Where, Pixels]:
    """Target minus aligned reference without the colour offset [H, W, 3], its valid region, and the offset [3]."""
    aligned, inside = _warped(reference, state)
    inside &= where
    residual = target - aligned
    colour = np.median(residual[inside], axis=0) if inside.any() else np.zeros(3, np.float32)
    near = inside & (np.abs(residual - colour).max(axis=2) < _FARTHEST)
    if near.any():
        colour = np.median(residual[near], axis=0)
    return residual - colour, inside, colour


def _warped(reference: Pixels, state: _State) -> tuple[Pixels, Where]:
    """The reference resampled onto the target, and the region that it covers."""
    x, y = _from_centre(reference)
    height, width = reference.shape[:2]
    right = (x * (1 + state.zoom) + state.shift[0]) / (width / 2)
    down = (y * (1 + state.zoom) + state.shift[1]) / (height / 2)
    grid = torch.from_numpy(np.stack(np.broadcast_arrays(right, down), axis=-1).astype(np.float32))[None]
    picture = torch.from_numpy(reference).permute(2, 0, 1)[None]
    aligned = grid_sample(picture, grid, mode="bicubic", padding_mode="border", align_corners=False)
    inside = (np.abs(right) <= 1 - 3 / width) & (np.abs(down) <= 1 - 3 / height)
    return aligned[0].permute(1, 2, 0).numpy(), inside


def _from_centre(pixels: Pixels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Column [1, W] and row [H, 1] coordinates in pixels from the centre."""
    height, width = pixels.shape[:2]
    return (np.arange(width) - (width - 1) / 2)[None], (np.arange(height) - (height - 1) / 2)[:, None]


def _refine(target: Pixels, reference: Pixels, where: Where, state: _State) -> float:
    """Refine `state` in place by Gauss-Newton on shift and zoom. Returns the shift's standard error in pixels."""
    x, y = _from_centre(target)
    half = max(target.shape[:2]) / 2
    scale, normal = _FARTHEST, np.eye(3)
    for _ in range(_STEPS):
        residual, inside, _ = _residual(target, reference, where, state)
        if not inside.any():
            return math.inf
        aligned, _ = _warped(reference, state)
        down, right = np.gradient(aligned, axis=(0, 1))
        slopes = np.stack([right, down, (right * x[..., None] + down * y[..., None]) / half], axis=-1)
        scale = min(max(2.0, 1.5 * float(np.median(np.abs(residual[inside])))), _FARTHEST / 2)
        weight = inside[..., None] / (1 + (residual / scale) ** 2) ** 2
        normal = np.einsum("hwci,hwc,hwcj->ij", slopes, weight, slopes, optimize=True) + 1e-3 * np.eye(3)
        step = np.linalg.solve(normal, np.einsum("hwci,hwc,hwc->i", slopes, weight, residual, optimize=True))
        step = np.clip(step, -2, 2)
        state.shift = state.shift + step[:2]
        state.zoom += float(step[2]) / half
        if np.abs(step).max() < 5e-3:
            break
    return float(scale * math.sqrt(np.linalg.inv(normal)[:2, :2].diagonal().max()))
