"""The trainings under way in this process, so that a request can look at one or end it and keep the LoRA."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from ..trainer_core.events import StepReport

_runs: dict[str, ActiveRun] = {}


@dataclass(slots=True)
class ActiveRun:
    """One training under way."""

    name: str
    keep: threading.Event = field(default_factory=threading.Event)
    last_step: StepReport | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        step = self.last_step
        return {
            "run_name": self.name,
            "step": step.step if step else 0,
            "num_steps": step.num_steps if step else 0,
            "loss": step.loss if step else None,
            "stopping": self.keep.is_set(),
        }


@contextmanager
def active_run(name: str) -> Iterator[ActiveRun]:
    """Lists the run while the block lasts."""
    run = ActiveRun(name)
    _runs[name] = run
    try:
        yield run
    finally:
        del _runs[name]


def active_runs() -> list[dict[str, object]]:
    """All trainings under way."""
    return [run.as_dict() for run in list(_runs.values())]


def stop_and_keep(name: object) -> bool:
    """Ask the run `name` to end and export what it has. False if there is no such run under way."""
    run = _runs.get(name) if isinstance(name, str) else None
    if run is not None:
        run.keep.set()
    return run is not None
