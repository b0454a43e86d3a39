"""Settings of the optimizer and the learning rate schedule. Combinations that can't work are errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import If, Limits, Settings, check, setting

OptimizerName = Literal["adamw", "adamw-8bit", "adafactor", "lion", "prodigy", "adamw-schedulefree"]
SchedulerName = Literal[
    "constant_with_warmup",
    "cosine",
    "linear",
    "constant",
    "cosine_with_restarts",
    "polynomial",
    "cosine_wave",
    "sine_wave",
]
CONSTANT: tuple[SchedulerName, ...] = ("constant", "constant_with_warmup")
WAVES: tuple[SchedulerName, ...] = ("cosine_wave", "sine_wave")
ENDLESS: tuple[SchedulerName, ...] = (*CONSTANT, *WAVES)
"""Schedules that do not depend on the number of steps."""
_SECOND_MOMENT = If("optimizer", differs=("adafactor", "lion"))


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig(Settings):
    """The optimizer and the learning rate schedule."""

    optimizer: OptimizerName = setting(
        "adamw",
        "adamw: the usual one. adamw-8bit: a quarter of the VRAM for its state; needs bitsandbytes and CUDA. lion: "
        "half of that VRAM. adafactor: little of it. prodigy: finds the learning rate itself. adamw-schedulefree: "
        "averages weights instead of lowering the learning rate.",
    )
    learning_rate: float = setting(
        1e-4,
        "Peak learning rate. 1e-4 for ranks up to 32, 5e-5 above and for long runs; a third of that for lion. For "
        "prodigy it is a factor on the rate that prodigy finds: set it to 1.",
        Limits(above=0, max=10, usual="1e-4", soft_min=1e-8, step=1e-6, round=1e-8),
    )
    lr_scheduler: SchedulerName = setting(
        "constant_with_warmup",
        "Learning rate schedule after the warm-up. constant has no warm-up. adamw-schedulefree needs a constant one. "
        "cosine_wave and sine_wave, SimpleTuner's cosine and sine, swing between learning_rate and lr_end for the "
        "whole run. cosine_wave starts at learning_rate, sine_wave half-way between the two.",
    )
    lr_warmup_steps: int = setting(
        10,
        "Steps over which the learning rate rises from zero.",
        Limits(min=0, soft_max=100_000),
        used_if=(If("lr_scheduler", differs=("constant",)),),
        unused=0,
    )
    weight_decay: float = setting(
        0.01,
        "Decoupled weight decay: each step shrinks the weights by this times the learning rate.",
        Limits(min=0, soft_max=1, step=0.001, round=1e-6),
    )
    adam_beta1: float = setting(
        0.9,
        "Decay of the running mean of the gradient. Not used by adafactor.",
        Limits(min=0, below=1, soft_max=0.9999, step=0.01, round=1e-4),
        used_if=(If("optimizer", differs=("adafactor",)),),
    )
    adam_beta2: float = setting(
        0.999,
        "Decay of the running mean of the squared gradient. Not used by adafactor and lion.",
        Limits(min=0, below=1, soft_max=0.99999, step=0.001, round=1e-5),
        used_if=(_SECOND_MOMENT,),
    )
    adam_epsilon: float = setting(
        1e-8,
        "Number added to Adam's denominator. Not used by adafactor and lion.",
        Limits(above=0, soft_min=1e-16, soft_max=0.01, step=1e-8, round=1e-16),
        used_if=(_SECOND_MOMENT,),
    )
    max_grad_norm: float = setting(
        1.0,
        "Gradients with a larger norm are scaled down to it. 0 turns this off.",
        Limits(min=0, soft_max=1000, step=0.1),
    )
    lr_num_cycles: int = setting(
        1,
        "Number of cycles of cosine_with_restarts, each from the peak to zero.",
        Limits(min=1, soft_max=1000),
        used_if=(If("lr_scheduler", ("cosine_with_restarts",)),),
    )
    lr_power: float = setting(
        1.0,
        "Exponent of polynomial: 1 is a straight line, larger values fall faster at first.",
        Limits(above=0, soft_min=0.1, soft_max=10, step=0.1),
        used_if=(If("lr_scheduler", ("polynomial",)),),
    )
    lr_end: float = setting(
        1e-7,
        "Final learning rate of polynomial, and the lowest one of cosine_wave and sine_wave.",
        Limits(min=0, soft_max=0.1, step=1e-7, round=1e-10),
        used_if=(If("lr_scheduler", ("polynomial", *WAVES)),),
    )
    lion_beta2: float = setting(
        0.99,
        "Decay of lion's momentum. adam_beta1 sets the share of the momentum in an update; the rest is the gradient.",
        Limits(min=0, below=1, soft_max=0.99999, step=0.01, round=1e-5),
        used_if=(If("optimizer", ("lion",)),),
    )
    prodigy_d_coef: float = setting(
        1.0,
        "Factor on the learning rate that prodigy finds: 0.5 is cautious, 2 is bold.",
        Limits(above=0, soft_min=0.01, soft_max=100, step=0.1),
        used_if=(If("optimizer", ("prodigy",)),),
    )

    lr_wave_steps: int = setting(
        100,
        "Steps that cosine_wave and sine_wave take from the highest to the lowest learning rate.",
        Limits(min=1, soft_max=100_000),
        used_if=(If("lr_scheduler", WAVES),),
    )

    def check_combinations(self) -> None:
        """Checks that the learning rate and its schedule suit the optimizer."""
        self._check_learning_rate()
        self._check_schedule()

    def _check_learning_rate(self) -> None:
        rate = self.learning_rate
        if self.optimizer == "prodigy":
            allowed = "0.1 to 10 with optimizer prodigy, which multiplies the rate it finds by it; set it to 1"
            check(0.1 <= rate <= 10, "learning_rate", rate, allowed)
        else:
            check(rate < 1, "learning_rate", rate, "above 0 and below 1, usually 1e-4 (1 is for optimizer prodigy)")

    def _check_schedule(self) -> None:
        name = self.lr_scheduler
        if self.optimizer == "adamw-schedulefree":
            allowed = f"one of {', '.join(CONSTANT)} with optimizer adamw-schedulefree, which replaces a falling rate"
            check(name in CONSTANT, "lr_scheduler", name, allowed)
            allowed = "above 0 with optimizer adamw-schedulefree, usually 0.9"
            check(self.adam_beta1 > 0, "adam_beta1", self.adam_beta1, allowed)
        if name == "constant":
            allowed = "0 with lr_scheduler constant; use constant_with_warmup for a warm-up"
            check(self.lr_warmup_steps == 0, "lr_warmup_steps", self.lr_warmup_steps, allowed)
        if name == "polynomial":
            allowed = f"below learning_rate ({self.learning_rate!r}) with lr_scheduler polynomial"
            check(self.lr_end < self.learning_rate, "lr_end", self.lr_end, allowed)
        if name in WAVES:
            allowed = f"at most learning_rate ({self.learning_rate!r}) with lr_scheduler {name}"
            check(self.lr_end <= self.learning_rate, "lr_end", self.lr_end, allowed)


def check_warmup(optimizer: OptimizerConfig, num_steps: int) -> None:
    """Raises ConfigError if a falling schedule would spend all `num_steps` of the run in the warm-up."""
    warmup = optimizer.lr_warmup_steps
    allowed = (
        f"less than max_train_steps ({num_steps}) with lr_scheduler {optimizer.lr_scheduler}, usually at most a tenth "
        "of it"
    )
    check(optimizer.lr_scheduler in ENDLESS or warmup < num_steps, "lr_warmup_steps", warmup, allowed)
