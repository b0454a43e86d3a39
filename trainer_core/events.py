"""What a long call tells its caller, and how the caller stops it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Protocol

from .errors import Interrupted

# What a validation finds, as reports, metrics and charts name it.
VALIDATION_LOSSES = ("validation_loss", "ema_validation_loss")  # of the trained weights and of their running average
DRIFT = ("drift_shift", "drift_zoom", "drift_colour")
MEASURED = (*VALIDATION_LOSSES, *DRIFT)


class Stop(Enum):
    """The caller's wish. False in a condition when there is none."""

    NO = "no"
    PAUSE = "pause"  # save, so that the same run can go on later
    KEEP = "keep"  # end here: save and export what there is

    def __bool__(self) -> bool:
        return self is not Stop.NO


@dataclass(frozen=True, slots=True, kw_only=True)
class StepReport:
    """One optimizer step. Loss is the mean over the step's pairs; bytes are 0 where the device can't tell.

    `extra_forwards` are those of rollouts; None in a step that could have none. What a validation found is None where
    there was none; drift (see SampleReport) also where it can't be measured.
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
    drift_shift: float | None = None
    drift_zoom: float | None = None
    drift_colour: float | None = None

    @property
    def was_validated(self) -> bool:
        """Whether a validation found something at this step."""
        return any(getattr(self, name) is not None for name in MEASURED)

    def as_dict(self) -> dict[str, object]:
        """For JSON: the fields, without those that say nothing."""
        row: dict[str, object] = {name: getattr(self, name) for name in StepReport.__slots__}
        return {name: value for name, value in row.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleReport:
    """Validation pictures of one step: the grid's file, and mean peak signal-to-noise ratios (dB) against the targets.

    `drift_shift` (pixels), `drift_zoom` (percent) and `drift_colour` (of 255) say how far the LoRA's pictures are off
    the targets outside the edited region. None where no picture can be held against its target.
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

    def as_text(self) -> str:
        """The figures for people; empty where there is none."""
        ratios = {"base": self.psnr_base, "LoRA": self.psnr_lora, "EMA": self.psnr_ema, "VAE alone": self.psnr_vae}
        found = ", ".join(f"{name} {value:.1f} dB" for name, value in ratios.items() if value is not None)
        if self.drift_shift is None:
            return found
        return f"{found}; drift {self.drift_shift:.2f} px, {self.drift_zoom:.2f} %, {self.drift_colour:.1f} of 255"

    def drift(self) -> dict[str, float]:
        """The drift by its names; empty where there is none."""
        found = {name: getattr(self, name) for name in DRIFT}
        return {name: value for name, value in found.items() if value is not None}


class Observer(Protocol):
    """Watches a call. `should_stop` is asked at least once per micro-batch, picture, layer and sampling step."""

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """`phase` is a short sentence for people; `done` of `total` parts of it are finished."""

    def on_step(self, report: StepReport) -> None:
        """After every optimizer step."""

    def on_samples(self, report: SampleReport) -> None:
        """After every validation."""

    def should_stop(self) -> Stop:
        """What the user wants now."""
        ...


class SilentObserver:
    """Watches nothing and never stops. Also the base of observers that need only a part."""

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """Ignored."""

    def on_step(self, report: StepReport) -> None:
        """Ignored."""

    def on_samples(self, report: SampleReport) -> None:
        """Ignored."""

    def should_stop(self) -> Stop:
        """Never."""
        return Stop.NO


SILENT = SilentObserver()


def raise_if_stopped(observer: Observer) -> None:
    """For phases whose finished parts are already on disk: end now.

    Raises:
        Interrupted: the observer wants to stop.
    """
    if stop := observer.should_stop():
        raise Interrupted(keep=stop is Stop.KEEP)
