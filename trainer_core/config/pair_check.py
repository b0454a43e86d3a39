"""Settings of the pair checker."""

from __future__ import annotations

from dataclasses import dataclass

from ..settings import Limits, Settings, setting


@dataclass(frozen=True, slots=True, kw_only=True)
class PairCheckConfig(Settings):
    """Limits beyond which the pair checker reports a pair. They change and skip nothing."""

    max_shift: float = setting(
        0.75,
        "Maximum shift between reference and target outside the edit, in pixels of the target. 0.5 to 1 is typical.",
        Limits(min=0, soft_max=1000, step=0.05),
    )
    max_zoom_percent: float = setting(
        0.3,
        "Maximum difference in scale between reference and target, in percent.",
        Limits(min=0, soft_max=100, step=0.05),
    )
    max_colour_offset: float = setting(
        3.0,
        "Maximum difference in brightness or colour outside the edit, in 8-bit steps. Set it higher if the edit "
        "changes colours.",
        Limits(min=0, soft_max=255, step=0.5),
    )
    min_difference: float = setting(
        6.0,
        "Minimum difference between target and reference at their most different spot, in 8-bit steps. A pair below it "
        "teaches nothing.",
        Limits(min=0, soft_max=255, step=0.5),
    )
    duplicate_bits: int = setting(
        6,
        "Pairs whose picture hashes differ in at most this many of 128 bits are reported as near-duplicates. 0 reports "
        "only equal hashes.",
        Limits(min=0, max=40, unit="bits"),
    )
    check_side: int = setting(
        512,
        "Longer side in pixels at which doubtful pairs are measured; those that are clearly good are measured at 128. "
        "512 is fast, 1024 is more precise.",
        Limits(min=128, max=4096, unit="pixels", step=64),
    )
