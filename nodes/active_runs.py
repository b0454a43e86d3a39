"""The trainings under way in this process, so that a request can look at one or end it and keep the LoRA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from ..trainer_core.events import StepReport

_runs: dict[str, ActiveRun] = {}


_SPEED_KEEPS = 0.9  # of the mean time of a step, when the next one comes


@dataclass(slots=True)
class ActiveRun:
    """One training under way, at the node that the user sees."""

    name: str
    node_id: str | None = None
    keep: threading.Event = field(default_factory=threading.Event)
    last_step: StepReport | None = None
    seconds_per_step: float | None = None
    phase: str = ""

    def note(self, report: StepReport) -> None:
        """One more step is done."""
        mean = self.seconds_per_step
        faster = report.seconds if mean is None else _SPEED_KEEPS * mean + (1 - _SPEED_KEEPS) * report.seconds
        self.last_step, self.seconds_per_step, self.phase = report, faster, ""

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        step, seconds = self.last_step, self.seconds_per_step
        left = (step.num_steps - step.step) * seconds if step and seconds is not None else None
        known = {"step": step.step, "num_steps": step.num_steps, "loss": step.loss} if step else {}
        return {
            "run_name": self.name,
            "node_id": self.node_id,
            "phase": self.phase,
            "seconds_per_step": seconds,
            "seconds_left": left,
            "peak_bytes": step.peak_bytes if step else 0,
            "learning_rate": step.learning_rate if step else None,
            "stopping": self.keep.is_set(),
            **known,
        }


@contextmanager
def active_run(name: str, node_id: str | None = None) -> Iterator[ActiveRun]:
    """Lists the run while the block lasts."""
    run = ActiveRun(name, node_id)
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


RUN_MESSAGE = "qwen_edit_trainer.run"
_EVERY_SECONDS = 0.5
_MAX_POINTS = 200  # in one message; of more steps every second one, every third one, ...

Send = Callable[[str, dict[str, Any]], None]


class LiveMessages:
    """Sends a run's state and the steps since the last message. `send` must be allowed from this thread."""

    def __init__(self, run: ActiveRun, send: Send) -> None:
        self._run, self._send = run, send
        self._points: list[StepReport] = []
        self._sent_at = float("-inf")

    def step(self, report: StepReport) -> None:
        """One more step."""
        self._run.note(report)
        self._points.append(report)
        if time.monotonic() - self._sent_at >= _EVERY_SECONDS or report.was_validated:
            self._flush()

    def phase(self, text: str) -> None:
        """What is going on besides steps, such as loading."""
        self._run.phase = text
        if time.monotonic() - self._sent_at >= _EVERY_SECONDS:
            self._flush()

    def samples(self, step: int) -> None:
        """The pictures of a step are in the run folder."""
        self._flush(samples=step)

    def _flush(self, **more: Any) -> None:
        every = 1 + len(self._points) // _MAX_POINTS
        points = [report.as_dict() for report in self._points if report.step % every == 0 or report.was_validated]
        self._points, self._sent_at = [], time.monotonic()
        self._send(RUN_MESSAGE, {**self._run.as_dict(), "active": True, "points": points, **more})
