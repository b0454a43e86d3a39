"""When the dry step compiles the blocks by itself."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from trainer_core import dry_step
from trainer_core.dry_step import Measured
from trainer_core.errors import OutOfMemoryError
from trainer_core.memory.compilation import Compilation

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


@pytest.mark.parametrize(
    ("compiled", "taken", "words"),
    [
        (3.0, 3.0, ""),
        (5.0, 4.0, "compiled ones are not faster here"),
        (None, 4.0, "compiled ones need more memory than is free"),
    ],
)
def test_auto_keeps_compiled_blocks_that_fit_and_are_faster(
    compiled: float | None, taken: float, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    """An uncompiled step took 4 seconds. None: there is not enough memory for compiled blocks."""
    weight = nn.Parameter(torch.zeros(1))
    networks = SimpleNamespace(
        compilation=Compilation([nn.Linear(1, 1), nn.Linear(1, 1)]), optimizer=torch.optim.SGD([weight], lr=1)
    )

    def measure() -> Measured:
        assert networks.compilation.is_active
        if compiled is None:
            weight.grad = torch.ones(1)
            raise OutOfMemoryError("too little memory")
        return Measured(compiled, 2)

    found = dry_step._compiled_if_better(networks, measure, Measured(4.0, 1))  # type: ignore[arg-type]
    assert found == Measured(taken, 1 if words else 2)
    assert networks.compilation.is_active == (not words)
    assert words in caplog.text and bool(words) == bool(caplog.text)
    assert weight.grad is None
