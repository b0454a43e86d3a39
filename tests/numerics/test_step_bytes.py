"""Bytes of the full-size step, counted on the meta device: it fits a 24 GB card, and the plan is close."""

from __future__ import annotations

import pytest

from tests.support.full_size_step import GIB, Setting, planned_bytes
from tests.support.live_bytes import traced_step

LAYERS = 60
WORKSPACES = 0.1 * GIB  # of CUDA's libraries, which the count does not include


def counted_bytes(precision: str, memory: str = "full", *, side: int = 1024, references: int = 1) -> float:
    """Peak bytes of a step of all layers, extrapolated from 4 and 6: all blocks but the outermost need the same."""
    setting = Setting("ours", precision, side, references, memory)
    few, more = (traced_step(setting, layers).peak for layers in (4, 6))
    return more + (more - few) / 2 * (LAYERS - 6)


def test_int8_fits_a_card_of_24_gb_without_streaming() -> None:
    """Target and reference have 1 MP. Such a card has 23.5 GiB left besides CUDA's own memory."""
    assert counted_bytes("int8-quanto") + WORKSPACES < 23.5 * GIB
    assert counted_bytes("int8-quanto", "full,offload") + WORKSPACES < 21 * GIB


@pytest.mark.parametrize(
    "case",
    [
        {"precision": "none"},
        {"precision": "int8-quanto"},
        {"precision": "int8-quanto", "memory": "full,offload"},
        {"precision": "int8-quanto", "memory": "none"},
        {"precision": "int8-quanto", "references": 3},
        {"precision": "int8-quanto", "side": 512, "references": 0},
        {"precision": "fp8-quanto", "side": 512, "references": 2, "memory": "full,offload"},
    ],
    ids=lambda case: " ".join(map(str, case.values())),
)
def test_the_plan_is_within_a_twentieth_of_what_is_counted(case: dict) -> None:
    precision, memory = case["precision"], case.get("memory", "full")
    side, references = case.get("side", 1024), case.get("references", 1)
    counted = counted_bytes(precision, memory, side=side, references=references)
    planned = planned_bytes(Setting("ours", precision, side, references, memory), LAYERS)
    assert planned == pytest.approx(counted + WORKSPACES, rel=0.05)
    assert planned > counted
