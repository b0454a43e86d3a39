"""Device memory of a full-size step, counted without a GPU: int8 fits a card of 24 GB, and the plan is close."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.full_size_step import GIB
from tests.support.live_bytes import traced_step
from tests.support.plan_cases import PLAN_CASES, case_name, planned_step, setting

LAYERS = 60
FEW = 4  # layers, enough for a first, a last and two others
WORKSPACES = 0.1 * GIB  # of CUDA's libraries, which the count does not include


@pytest.mark.parametrize(("memory", "card"), [("full,attention", 23.5), ("full,offload", 21)])
def test_int8_fits_a_card_of_24_gb_without_streaming(memory: str, card: float) -> None:
    """Target and reference have 1 MP. Such a card has 23.5 GiB left besides CUDA's own memory.

    All blocks but the outermost need the same, so a network of few layers shows what the whole one needs.
    """
    few, more = (traced_step(setting(memory=memory), layers).peak for layers in (FEW - 1, FEW))
    assert more + (more - few) * (LAYERS - FEW) + WORKSPACES < card * GIB


@pytest.mark.parametrize("case", PLAN_CASES, ids=case_name)
def test_the_plan_is_within_a_twentieth_of_what_is_counted(case: dict[str, Any]) -> None:
    """Compared is what a step needs beside its frozen weights, so that their size hides no error."""
    size = planned_step(setting(**case), FEW)
    counted = traced_step(setting(**case), FEW).peak - size.weights
    assert size.others == pytest.approx(counted, rel=0.05)
