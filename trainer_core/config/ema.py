"""Settings of the exponential moving average (EMA) of the adapter's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import If, Limits, Settings, check, setting
from .optimizer import OptimizerConfig

EmaDevice = Literal["cpu", "accelerator"]
EmaValidation = Literal["none", "ema_only", "comparison"]
_ON = If("use_ema", (True,))


@dataclass(frozen=True, slots=True, kw_only=True)
class EmaConfig(Settings):
    """An exponential moving average (EMA) of the adapter's weights, exported as a second LoRA.

    It does not change the training.
    """

    use_ema: bool = setting(
        False, "Keep a moving average of the adapter's weights. It varies less than the weights of a single step."
    )
    ema_device: EmaDevice = setting(
        "cpu",
        "Where the float32 average is stored: cpu needs no VRAM, accelerator avoids a copy to the host per update.",
        used_if=(_ON,),
    )
    ema_decay: float = setting(
        0.995,
        "Fraction of the average that an update keeps. 0.995 averages over about 200 updates, 0.999 over about 1000. "
        "The first updates keep less: n / (n + 9) after step n.",
        Limits(above=0, below=1, usual="0.99 to 0.9999", soft_min=0.01, soft_max=0.99999, step=0.001, round=1e-5),
        used_if=(_ON,),
    )
    ema_update_interval: int = setting(
        1, "Steps between updates of the average.", Limits(min=1, soft_max=10_000), used_if=(_ON,)
    )
    ema_validation: EmaValidation = setting(
        "comparison",
        "Which weights are validated. comparison: the trained weights and the average. ema_only: the average. none: "
        "the trained weights.",
        used_if=(_ON,),
    )


def check_ema(ema: EmaConfig, optimizer: OptimizerConfig) -> None:
    """Raises ConfigError if the optimizer already averages the weights."""
    averages = optimizer.optimizer == "adamw-schedulefree"
    check(
        not (ema.use_ema and averages),
        "use_ema",
        ema.use_ema,
        "false with optimizer adamw-schedulefree, which averages the weights itself",
    )
