"""Compares strengths of a trained LoRA by pictures of the held-out pairs.

The validation loss would take less time, but advises too low strengths: benchmarks/best_step_2026-12.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

STRENGTHS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2)
_GAIN = 0.1  # dB that another strength than 1 must gain to be advised


class Measured(NamedTuple):
    """A strength, and the PSNR (dB) of its pictures."""

    strength: float
    psnr: float


def compare(
    at_strength: Callable[[float], AbstractContextManager[None]], psnr: Callable[[], float | None]
) -> list[Measured]:
    """Measure each of STRENGTHS. `at_strength` puts it into the network while its context lasts."""
    found = []
    for strength in STRENGTHS:
        with at_strength(strength):
            found.append(Measured(strength, psnr() or 0.0))
    return found


def advised(measured: Sequence[Measured]) -> float:
    """The strength with the highest PSNR; 1 if the others gain little."""
    as_trained = next(each for each in measured if each.strength == 1.0)
    best = max(measured, key=lambda each: each.psnr)
    return best.strength if best.psnr - as_trained.psnr >= _GAIN else 1.0


def in_words(measured: Sequence[Measured]) -> str:
    """The strengths with their results, for the user."""
    return "PSNR " + ", ".join(f"{each.psnr:.1f} dB at {each.strength:g}" for each in measured)
