"""Compares strengths of a trained LoRA on the held-out pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import NamedTuple

STRENGTHS = (0.6, 0.8, 0.9, 1.0, 1.1, 1.2)
# What another strength than 1 must gain to be advised: a fraction of the loss, and PSNR in dB.
_LOSS_GAIN, _PSNR_GAIN = 0.005, 0.1


class Measured(NamedTuple):
    """A strength's validation loss, and the PSNR (dB) of its pictures; None if none were drawn."""

    strength: float
    loss: float
    psnr: float | None = None


def compare(
    at_strength: Callable[[float], AbstractContextManager[None]],
    loss: Callable[[], float],
    psnr: Callable[[], float | None] | None,
) -> list[Measured]:
    """Measure each of STRENGTHS. `at_strength` puts it into the network while its context lasts.

    `psnr`: None to draw no pictures.
    """
    found = []
    for strength in STRENGTHS:
        with at_strength(strength):
            found.append(Measured(strength, loss(), psnr() if psnr else None))
    return found


def advised(measured: Sequence[Measured]) -> float:
    """The strength to use: with the highest PSNR, or without pictures with the lowest loss. 1 if others gain little."""
    as_trained = next(each for each in measured if each.strength == 1.0)
    if as_trained.psnr is not None:
        best = max(measured, key=lambda each: each.psnr or 0.0)
        gains = (best.psnr or 0.0) - as_trained.psnr >= _PSNR_GAIN
    else:
        best = min(measured, key=lambda each: each.loss)
        gains = as_trained.loss - best.loss >= _LOSS_GAIN * abs(as_trained.loss)
    return best.strength if gains else 1.0


def in_words(measured: Sequence[Measured]) -> str:
    """The strengths with their results, for the user."""
    if measured[0].psnr is not None:
        return "PSNR " + ", ".join(f"{each.psnr:.1f} dB at {each.strength:g}" for each in measured)
    return "validation loss " + ", ".join(f"{each.loss:.4f} at {each.strength:g}" for each in measured)
