"""What pages are told while a training goes on: one kind of message, not more often than they can show it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ..trainer_core.events import StepReport
from .active_runs import ActiveRun

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
