"""Writes a run's metrics as JSON lines and for TensorBoard; both continue after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from importlib.util import find_spec

from ..errors import MissingPackageError
from ..events import MEASURED, StepReport
from .folder import RunFolder

_SCALARS = ("loss", "grad_norm", "learning_rate", *MEASURED, "extra_forwards")


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
    from tensorboardX import SummaryWriter

    with (
        run.metrics_file.open("a", encoding="utf-8") as lines,
        closing(SummaryWriter(str(run.path / "tensorboard"), purge_step=done + 1, flush_secs=10)) as tensorboard,
    ):

        def write(report: StepReport) -> None:
            lines.write(json.dumps(report.as_dict()) + "\n")
            lines.flush()
            scalars = {name: getattr(report, name) for name in _SCALARS}
            scalars.update({f"loss_by_sigma/{name}": loss for name, loss in report.loss_by_sigma.items()})
            for name, value in scalars.items():
                if value is not None:
                    tensorboard.add_scalar(name, value, report.step)

        yield write
