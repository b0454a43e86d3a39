"""Settings of the running average of the adapter's weights (EMA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check, check_at_least, check_choice, setting
from .optimizer import OptimizerConfig

EmaDevice = Literal["cpu", "accelerator"]
EmaValidation = Literal["none", "ema_only", "comparison"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaConfig:
    """A running average of the adapter's weights (EMA), exported beside them. It changes nothing about the training."""

    use_ema: bool = setting(
        False, "Keep a running average of the adapter's weights: steadier than the weights of any single step."
    )
    ema_device: EmaDevice = setting(
        "cpu", "Where the average lies, in float32: cpu takes no VRAM, accelerator saves a copy at every update."
    )
    ema_decay: float = setting(
        0.995,
        "Share of the average that an update keeps; 0.995 looks back some 200 updates, 0.999 some 1000. The first "
        "updates keep less: (1 + n) / (10 + n) at update n.",
    )
    ema_update_interval: int = setting(1, "Steps between updates of the average.")
    ema_validation: EmaValidation = setting(
        "comparison",
        "What is validated: comparison both the trained weights and the average, ema_only the average, none the "
        "trained weights.",
    )

    def __post_init__(self) -> None:
        check_choice(self, "ema_device", "ema_validation")
        check(0 < self.ema_decay < 1, "ema_decay", self.ema_decay, "above 0 and below 1, usually 0.99 to 0.9999")
        check_at_least(self, 1, "ema_update_interval")


def check_ema(ema: EmaConfig, optimizer: OptimizerConfig) -> None:
    """Raises ConfigError where the optimizer averages by itself."""
    averages = optimizer.optimizer == "adamw-schedulefree"
    check(
        not (ema.use_ema and averages), "use_ema", ema.use_ema, "false with adamw-schedulefree, which averages itself"
    )
