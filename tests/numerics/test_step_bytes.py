"""Device memory of a full-size step, counted without a GPU: int8 fits a card of 24 GB, and the plan is close."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.full_size_step import GIB, Setting, memory_plan
from tests.support.live_bytes import traced_step

LAYERS = 60
FEW = 4  # layers, enough for a first, a last and two others
WORKSPACES = 0.1 * GIB  # of CUDA's libraries, which the count does not include
WEIGHTS = ("frozen weights", "streaming buffers")


def setting(precision: str = "int8-quanto", memory: str = "full", side: int = 1024, **others: Any) -> Setting:
    """A step of the trainer with one reference."""
    return Setting("ours", precision, side, others.pop("references", 1), memory, **others)


@pytest.mark.parametrize(("memory", "card"), [("full", 23.5), ("full,offload", 21)])
def test_int8_fits_a_card_of_24_gb_without_streaming(memory: str, card: float) -> None:
    """Target and reference have 1 MP. Such a card has 23.5 GiB left besides CUDA's own memory.

    All blocks but the outermost need the same, so a network of few layers shows what the whole one needs.
    """
    few, more = (traced_step(setting(memory=memory), layers).peak for layers in (FEW - 1, FEW))
    assert more + (more - few) * (LAYERS - FEW) + WORKSPACES < card * GIB


@pytest.mark.parametrize(
    "case",
    [
        {"precision": "none"},
        {"precision": "nf4-bnb", "memory": "none"},
        {"precision": "int4-quanto", "side": 512},
        {"precision": "fp8-quanto", "references": 2, "memory": "full,offload"},
        {"references": 3, "memory": "blocks=2"},
        {"memory": "full,stream=2,buffers=2", "side": 512, "references": 0},
        {"adapter": "lokr", "targets": "attention-mlp", "memory": "none"},
        {"adapter": "dora", "targets": "attention-mlp", "memory": "none"},
        {"dropout": 0.1, "targets": "attention", "memory": "none"},
        {"batch": 2, "rollout": True, "memory": "none"},
        {"flavour": "edit-v3", "memory": "none", "batch": 2, "targets": "all"},
        {"quantised_inputs": True},
        {"arithmetic": "no", "memory": "none"},
        {"rank": 128, "targets": "all", "side": 512, "micro_batches": 2, "ema": True},
        {"rank": 128, "targets": "all", "side": 64, "optimizer": "adamw-schedulefree"},
    ],
    ids=lambda case: " ".join(map(str, case.values())),
)
def test_the_plan_is_within_a_twentieth_of_what_is_counted(case: dict[str, Any]) -> None:
    """Compared is what a step needs beside its frozen weights, so that their size hides no error."""
    phase = memory_plan(setting(**case), FEW).phase("training")
    assert phase is not None
    weights = sum(phase.parts.get(part, 0) for part in WEIGHTS)
    counted = traced_step(setting(**case), FEW).peak - weights
    assert phase.total_bytes - weights - phase.parts["libraries"] == pytest.approx(counted, rel=0.05)
