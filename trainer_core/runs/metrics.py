"""What a run says of itself while it goes: JSON lines and TensorBoard, both continued after a resume."""

from __future__ import annotations

import json
from importlib.util import find_spec
from types import TracebackType

from ..errors import MissingPackageError
from ..events import MEASURED, StepReport
from .folder import RunFolder

_NOT_ALWAYS = (*MEASURED, "extra_forwards")


def check_tensorboard() -> None:
    """Raises MissingPackageError where there is nothing to write TensorBoard's files with."""
    if find_spec("tensorboardX") is None:
        raise MissingPackageError("tensorboardX", "A training run")


class Metrics:
    """Open files of a run's metrics, which end at step `done`; none where `run` does not write. A context manager."""

    def __init__(self, run: RunFolder, done: int) -> None:
        self._lines = self._tensorboard = None
        if not run.writes:
            return
        check_tensorboard()
        from tensorboardX import SummaryWriter

        self._lines = run.metrics_file.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(run.tensorboard), purge_step=done + 1, flush_secs=10)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for each in (self._lines, self._tensorboard):
            if each is not None:
                each.close()

    def write(self, report: StepReport) -> None:
        """One step."""
        if self._lines is None or self._tensorboard is None:
            return
        self._lines.write(json.dumps(report.as_dict()) + "\n")
        self._lines.flush()
        scalars = {"loss": report.loss, "grad_norm": report.grad_norm, "learning_rate": report.learning_rate}
        found = {name: getattr(report, name) for name in _NOT_ALWAYS}
        scalars |= {name: value for name, value in found.items() if value is not None}
        scalars.update({f"loss_by_sigma/{name}": loss for name, loss in report.loss_by_sigma.items()})
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, report.step)
