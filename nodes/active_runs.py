"""The runs that this process trains or encodes pairs for, so that a request can read their state or stop one and keep
its LoRA."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from ..trainer_core.events import StepReport

_runs: dict[str, ActiveRun] = {}
_SMOOTHING = 0.9  # weight of the previous mean in the moving average of seconds per step


@dataclass(slots=True)
class ActiveRun:
    """A run in progress. `node_id` is the training node; `keep` is set when the user asks to stop and keep the LoRA.

    `state` is training, or encoding while another node encodes its pairs. `done` of `total` parts of the phase are
    finished; 0 if that is not known.
    """

    name: str
    node_id: str | None = None
    state: Literal["training", "encoding"] = "training"
    keep: threading.Event = field(default_factory=threading.Event)
    last_step: StepReport | None = None
    seconds_per_step: float | None = None
    phase: str = ""
    done: int = 0
    total: int = 0

    def note(self, report: StepReport) -> None:
        """Record a finished step."""
        mean = self.seconds_per_step
        smoothed = report.seconds if mean is None else _SMOOTHING * mean + (1 - _SMOOTHING) * report.seconds
        self.last_step, self.seconds_per_step = report, smoothed
        self.in_phase("")

    def in_phase(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Record a phase other than training steps, such as loading."""
        self.phase, self.done, self.total = phase, done, total

    def as_dict(self) -> dict[str, object]:
        """The state as JSON values."""
        step, seconds = self.last_step, self.seconds_per_step
        left = (step.num_steps - step.step) * seconds if step and seconds is not None else None
        known = {"step": step.step, "num_steps": step.num_steps, "loss": step.loss} if step else {}
        return {
            "run_name": self.name,
            "node_id": self.node_id,
            "state": self.state,
            "phase": self.phase,
            "phase_done": self.done,
            "phase_total": self.total,
            "seconds_per_step": seconds,
            "seconds_left": left,
            "peak_bytes": step.peak_bytes if step else 0,
            "learning_rate": step.learning_rate if step else None,
            "stopping": self.keep.is_set(),
            **known,
        }


@contextmanager
def active_run(
    name: str, node_id: str | None = None, state: Literal["training", "encoding"] = "training"
) -> Iterator[ActiveRun]:
    """List the run in `active_runs` while the block runs."""
    run = ActiveRun(name, node_id, state)
    _runs[name] = run
    try:
        yield run
    finally:
        _runs.pop(name, None)


def active_runs() -> list[dict[str, object]]:
    """State of all runs in progress."""
    return [run.as_dict() for run in list(_runs.values())]


def stop_and_keep(name: object) -> bool:
    """Ask the run `name` to stop and export its LoRA. False if no such run is being trained."""
    run = _runs.get(name) if isinstance(name, str) else None
    if run is None or run.state != "training":
        return False
    run.keep.set()
    return True


_ended: tuple[str | None, set[str | None]] = (None, set())  # training nodes of the prompt in which one ended last


def note_ended(prompt_id: str | None, node_id: str | None) -> None:
    """Record that the training of this node in this prompt has ended. The node itself may still be working."""
    global _ended
    if _ended[0] != prompt_id:
        _ended = (prompt_id, set())
    _ended[1].add(node_id)


def has_ended(prompt_id: str, node_id: str) -> bool:
    """Whether the training of this node in this prompt has ended."""
    return _ended[0] == prompt_id and node_id in _ended[1]


RUN_MESSAGE = "qwen_edit_trainer.run"
_EVERY_SECONDS = 0.5
_MAX_POINTS = 200  # per message; above that only every second, third, ... step is sent

Send = Callable[[str, dict[str, Any]], None]


class LiveMessages:
    """Sends the state of a run and the steps since the last message. `send` is called from the training thread."""

    def __init__(self, run: ActiveRun, send: Send) -> None:
        self._run, self._send = run, send
        self._points: list[StepReport] = []
        self._sent_at = float("-inf")

    def begin(self) -> None:
        """Report that the run has begun."""
        self._flush()

    def step(self, report: StepReport) -> None:
        """Record a step; send a message if one is due."""
        self._run.note(report)
        self._points.append(report)
        if time.monotonic() - self._sent_at >= _EVERY_SECONDS or report.was_validated:
            self._flush()

    def phase(self, text: str, done: int = 0, total: int = 0) -> None:
        """Record a phase other than training steps, such as loading."""
        self._run.in_phase(text, done, total)
        if time.monotonic() - self._sent_at >= _EVERY_SECONDS:
            self._flush()

    def samples(self, step: int) -> None:
        """Report that the sample pictures of a step are in the run folder."""
        self._flush(samples=step)

    def _flush(self, **more: Any) -> None:
        every = 1 + len(self._points) // _MAX_POINTS
        points = [report.as_dict() for report in self._points if report.step % every == 0 or report.was_validated]
        self._points, self._sent_at = [], time.monotonic()
        self._send(RUN_MESSAGE, {**self._run.as_dict(), "active": True, "points": points, **more})
