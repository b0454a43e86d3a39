"""Pictures with exactly known offsets."""

from __future__ import annotations

import functools

import numpy as np

WIDTH, HEIGHT = 192, 144


@functools.lru_cache(maxsize=64)
def scene(seed: int = 0, shift: tuple[float, float] = (0, 0), zoom: float = 1.0, colour: int = 0) -> np.ndarray:
    """Sine waves evaluated at shifted and zoomed coordinates, so the offset is exact. uint8 [HEIGHT, WIDTH, 3]."""
    rng = np.random.default_rng(seed)
    x, y = np.meshgrid(np.arange(WIDTH) - (WIDTH - 1) / 2, np.arange(HEIGHT) - (HEIGHT - 1) / 2)
    x, y = (x - shift[0]) / zoom, (y - shift[1]) / zoom
    waves = np.zeros((HEIGHT, WIDTH, 3))
    for channel in range(3):
        for _ in range(20):
            frequency, angle, phase = rng.uniform(0.02, 0.5), rng.uniform(0, 6.3), rng.uniform(0, 6.3)
            waves[..., channel] += np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    return np.clip(127 + waves * 14 + colour, 0, 255).round().astype(np.uint8)


def edited(seed: int = 0) -> np.ndarray:
    """The scene of this seed with different content in the middle quarter of its area."""
    target = scene(seed).copy()
    target[36:108, 48:144] = scene(seed + 50)[:72, :96]
    return target
