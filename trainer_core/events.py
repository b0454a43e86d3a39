"""Reports that a long call sends to its observer, and how the observer stops it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol, TypeVar

from .errors import Interrupted

T = TypeVar("T")

# Names of a validation's results in reports, metrics and charts.
VALIDATION_LOSSES = ("validation_loss", "ema_validation_loss")  # of the trained weights and of their EMA
DRIFT = ("drift_shift", "drift_zoom", "drift_colour")
MEASURED = (*VALIDATION_LOSSES, *DRIFT)


class Stop(Enum):
    """What the user wants a running call to do. NO is falsy."""

    NO = "no"
    PAUSE = "pause"  # save a checkpoint, so that the run can be resumed
    KEEP = "keep"  # end the training here: save, and export a LoRA of the finished steps

    def __bool__(self) -> bool:
        return self is not Stop.NO


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step. `loss` is the mean over the step's pairs; `peak_bytes` is 0 if the device doesn't report it.

    Turns that preserve have a loss of their own, `preservation_loss`; None if the step has none. In a step of only such
    turns, `loss` equals it. `extra_forwards` counts the forward passes of rollouts and of the base model; None if this
    step can't have any. The validation fields are
    None in a step without validation. The drift fields (see SampleReport) are also None if drift can't be measured.
    """

    step: int
    num_steps: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_by_sigma: dict[str, float]
    seconds: float
    peak_bytes: int = 0
    validation_loss: float | None = None
    ema_validation_loss: float | None = None
    extra_forwards: int | None = None
    preservation_loss: float | None = None
    drift_shift: float | None = None
    drift_zoom: float | None = None
    drift_colour: float | None = None

    @property
    def was_validated(self) -> bool:
        """Whether this step has a validation result."""
        return any(getattr(self, name) is not None for name in MEASURED)

    def as_dict(self) -> dict[str, object]:
        """The fields that are not None, for JSON."""
        return {name: value for name in StepReport.__slots__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """Validation pictures of one step: the grid file, and mean PSNR (dB) against the targets.

    `drift_shift` (pixels), `drift_zoom` (percent) and `drift_colour` (0 to 255) measure how far the LoRA's pictures
    deviate from the targets outside the edited region. None if no picture can be compared with its target; `unmeasured`
    then says why. It is empty if every picture was compared.
    """

    step: int
    grid_file: Path
    psnr_base: float | None
    psnr_lora: float | None
    psnr_vae: float | None
    psnr_ema: float | None = None
    drift_shift: float | None = None
    drift_zoom: float | None = None
    drift_colour: float | None = None
    unmeasured: str = ""

    def as_text(self) -> str:
        """The figures as sentences for the log and the page, and why some or all could not be measured."""
        ratios = {
            "without the LoRA": self.psnr_base,
            "with it": self.psnr_lora,
            "with its EMA": self.psnr_ema,
            "possible": self.psnr_vae,
        }
        found: list[str] = []
        if psnr := ", ".join(f"{value:.1f} dB {name}" for name, value in ratios.items() if value is not None):
            found.append(f"Likeness to the targets (PSNR, higher is better): {psnr}")
        if self.drift_shift is not None:
            found.append(
                f"Drift, the change outside the edit (less is better): {self.drift_shift:.2f} px, "
                f"{self.drift_zoom:.2f} % zoom, "
                f"{self.drift_colour:.1f} of 255 in colour"
            )
        if self.unmeasured:
            found.append(self.unmeasured)
        return ". ".join(found)

    def drift(self) -> dict[str, float]:
        """The drift fields that are not None, by name."""
        return {name: value for name in DRIFT if (value := getattr(self, name)) is not None}


class Observer(Protocol):
    """Receives a call's reports and can stop it."""

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """`done` of `total` parts of a phase are finished, `total` at least 1. `phase` is a short text for the user."""

    def on_note(self, text: str) -> None:
        """A sentence for the user, such as how long the run takes. The observer logs it."""

    def on_open(self, run_dir: Path) -> None:
        """Called once, when a training has opened its run folder and its settings fit what is there."""

    def on_step(self, report: StepReport) -> None:
        """Called after every optimizer step."""

    def on_samples(self, report: SampleReport) -> None:
        """Called after every validation that made pictures."""

    def should_stop(self) -> Stop:
        """What the user wants now. Called at least once per micro-batch, picture, layer and sampling step."""
        ...


class SilentObserver:
    """Ignores all reports and never stops. A base class for observers that need only some of the methods."""

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """Ignored."""

    def on_note(self, text: str) -> None:
        """Ignored."""

    def on_open(self, run_dir: Path) -> None:
        """Ignored."""

    def on_step(self, report: StepReport) -> None:
        """Ignored."""

    def on_samples(self, report: SampleReport) -> None:
        """Ignored."""

    def should_stop(self) -> Stop:
        """Always NO."""
        return Stop.NO


SILENT = SilentObserver()


def raise_if_stopped(observer: Observer) -> None:
    """Stop now if the observer wants to. For phases that write each finished part to disk, so that nothing is lost.

    Raises:
        Interrupted: the observer wants to stop.
    """
    if stop := observer.should_stop():
        raise Interrupted(keep=stop is Stop.KEEP)


def watched(items: Iterable[T], observer: Observer) -> Iterator[T]:
    """Yield the items one by one, and stop before the next one if the observer wants to.

    Raises:
        Interrupted: the observer wants to stop.
    """
    for item in items:
        raise_if_stopped(observer)
        yield item
