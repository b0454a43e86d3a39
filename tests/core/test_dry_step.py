"""When the dry step compiles the blocks by itself."""

from __future__ import annotations

import logging

import pytest
import torch

from trainer_core import dry_step

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("has_triton", "left", "pays", "words"),
    [
        (True, 3600, True, ""),
        (True, 120, False, "only 2 min are left"),
        (False, 3600, False, "Triton is not installed"),
    ],
)
def test_auto_compiles_where_that_is_possible_and_shortens_the_run(
    has_triton: bool,
    left: float,
    pays: bool,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(dry_step, "can_compile", lambda _: has_triton)
    assert dry_step._pays(CUDA, left) == pays
    assert words in caplog.text and bool(words) == bool(caplog.text)
