"""StepReport.was_validated, and the validation losses in the console line."""

from __future__ import annotations

import logging
from typing import Any

import pytest

from trainer_core.__main__ import ConsoleObserver
from trainer_core.events import MEASURED, VALIDATION_LOSSES, StepReport


def report(**found: Any) -> StepReport:
    values = {"loss": 0.5, "grad_norm": 1.0, "learning_rate": 1e-4, "loss_by_sigma": {}, "seconds": 2.0}
    return StepReport(step=1, num_steps=9, **values, **found)


@pytest.mark.parametrize("name", MEASURED)
def test_a_report_knows_whether_it_was_validated(name: str) -> None:
    assert report(**{name: 0.0}).was_validated
    assert not report(extra_forwards=3).was_validated
    assert "was_validated" not in report().as_dict()


@pytest.mark.parametrize("names", [(), *((name,) for name in VALIDATION_LOSSES), VALIDATION_LOSSES])
def test_the_console_tells_each_loss_on_held_out_pairs(
    names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    ConsoleObserver().on_step(report(**dict.fromkeys(names, 0.25)))
    assert caplog.messages[-1].endswith("2.00 s" + "".join(f"  {name.replace('_', ' ')} 0.2500" for name in names))


def test_the_console_shows_each_note_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    observer = ConsoleObserver()
    for note in ("About 3 h.", "Not measured.", "About 3 h."):
        observer.on_note(note)
    observer.on_progress("Encoding prompts", 1, 2)
    assert caplog.messages == ["About 3 h.", "Not measured.", "Encoding prompts: 1 of 2"]
