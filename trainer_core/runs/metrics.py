"""Writes a run's metrics as JSON lines and for TensorBoard; both continue after a resume."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from importlib.util import find_spec
from pathlib import Path

from ..errors import MissingPackageError
from ..events import MEASURED, StepReport
from .folder import RunFolder

_SCALARS = ("loss", "grad_norm", "learning_rate", *MEASURED, "extra_forwards")
_FLUSH_SECONDS = 10


def check_tensorboard() -> None:
    """Raises MissingPackageError if the package that writes TensorBoard files is not installed."""
    if find_spec("tensorboardX") is None:
        raise MissingPackageError("tensorboardX", "A training run")


@contextmanager
def metrics_writer(run: RunFolder, done: int) -> Iterator[Callable[[StepReport], None]]:
    """Yields a function that appends the reports of steps after `done`. It does nothing if `run` doesn't write."""
    if not run.writes:
        yield lambda _: None
        return
    with (
        run.metrics_file.open("a", encoding="utf-8") as lines,
        closing(_TensorBoard(run.path / "tensorboard", done)) as tensorboard,
    ):

        def write(report: StepReport) -> None:
            lines.write(json.dumps(report.as_dict()) + "\n")
            lines.flush()
            scalars = {name: getattr(report, name) for name in _SCALARS}
            scalars.update({f"loss_by_sigma/{name}": loss for name, loss in report.loss_by_sigma.items()})
            tensorboard.write(report.step, {name: value for name, value in scalars.items() if value is not None})

        yield write


class _TensorBoard:
    """Writes TensorBoard's event files in this thread.

    tensorboardX's own SummaryWriter writes in another thread, and waits for it forever once the disk is full.
    """

    def __init__(self, folder: Path, done: int) -> None:
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.summary import scalar

        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._event, self._scalar = EventsWriter(str(folder / "events")), Event, scalar
        self._flushed_at = time.monotonic()
        start = SessionLog(status=SessionLog.START)
        self._file.write_event(Event(step=done + 1, session_log=start))  # hides later steps of an earlier start

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        """Write the values of a step."""
        for name, value in scalars.items():
            self._file.write_event(self._event(wall_time=time.time(), step=step, summary=self._scalar(name, value)))
        if time.monotonic() - self._flushed_at > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed_at = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()
