"""How alike gradients are that decide between 8-bit and bf16 products, and what a run has chosen."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from trainer_core.config import ModelConfig
from trainer_core.products import LEAST_COSINE, Likeness, kept_choice, likeness
from trainer_core.runs.folder import RunFolder


def test_gradients_that_are_not_finite_are_not_alike() -> None:
    right = {"a": torch.ones(3), "b": torch.tensor([2.0])}
    assert likeness(right, right) == Likeness(1.0, 0.0)
    found = likeness({"a": torch.ones(3), "b": torch.tensor([-2.0])}, right)
    assert found.cosine == pytest.approx(-1 / 7) and found.error == pytest.approx((16 / 7) ** 0.5)
    wrong = likeness({"a": torch.tensor([1.0, torch.nan, 1.0]), "b": right["b"]}, right)
    assert not wrong.cosine >= LEAST_COSINE


@pytest.mark.parametrize(
    ("known", "steps", "choice"),
    [
        ("8bit", 0, "8bit"),
        ("bf16", 5, "bf16"),
        (None, 0, "auto"),
        (None, 5, "bf16"),
        ("unknown", 0, "auto"),
    ],
)
def test_a_run_has_one_choice(
    known: str | None, steps: int, choice: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a known one, a run with steps began in an older version, which had only bf16."""
    run = RunFolder(tmp_path)
    monkeypatch.setattr(RunFolder, "state", lambda _: {} if known is None else {"matmul_precision": known})
    monkeypatch.setattr(RunFolder, "steps_done", lambda _: steps)
    model = ModelConfig(base_model_precision="int8-quanto")
    assert kept_choice(model, run) == choice
    for wish in ("bf16", "8bit"):
        assert kept_choice(dataclasses.replace(model, matmul_precision=wish), run) == wish
