"""The memory plan against the peak of real steps on a GPU, with a network of full width and few layers.

`benchmarks/step_bytes.py --cases` prints the sizes; it needs no GPU to count them.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.full_size_step import GIB
from tests.support.plan_cases import PLAN_CASES, case_name, measured_peak, planned_step, setting
from trainer_core.qwen_image import query_key

LAYERS = 6
# A few layers need little beside constants such as the workspaces of CUDA's libraries, which depend on the card.
CONSTANTS = 0.15 * GIB


@pytest.mark.parametrize("case", PLAN_CASES, ids=case_name)
def test_a_step_needs_what_is_planned(case: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared is what a step needs beside its frozen weights, so that their size hides no error. Queries and keys are
    rotated without Triton, as the plan expects: its kernel needs no float32 copies."""
    monkeypatch.setattr(query_key, "_has_kernels", lambda _: False)
    size = planned_step(setting(**case), LAYERS)
    measured = measured_peak(setting(**case), LAYERS, torch.device("cuda")) - size.weights
    assert abs(size.others + size.libraries - measured) <= 0.05 * measured + CONSTANTS
