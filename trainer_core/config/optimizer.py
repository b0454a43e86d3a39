"""Settings of the optimizer and of the learning rate's course. Pairings that can't work are refused here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import ConfigError
from ..settings import check, check_at_least, check_choice, setting

OptimizerName = Literal["adamw", "adamw-8bit", "adafactor", "lion", "prodigy", "adamw-schedulefree"]
SchedulerName = Literal["constant_with_warmup", "cosine", "linear", "constant", "cosine_with_restarts", "polynomial"]
ENDLESS: tuple[SchedulerName, ...] = ("constant", "constant_with_warmup")  # don't ask how many steps there will be


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerConfig:
    """How the adapter is moved."""

    optimizer: OptimizerName = setting(
        "adamw",
        "adamw; adamw-8bit (bitsandbytes, CUDA) with a quarter of its state; lion with half; adafactor with little; "
        "prodigy finds the learning rate itself; adamw-schedulefree averages weights instead of lowering the rate.",
    )
    learning_rate: float = setting(
        1e-4,
        "Peak learning rate. 1e-4 for ranks to 16, 5e-5 above; a third of that for lion; 1 for prodigy, where it is a "
        "factor.",
    )
    lr_scheduler: SchedulerName = setting(
        "constant_with_warmup",
        "Course of the learning rate after the warm-up; constant has none. adamw-schedulefree takes the constant ones.",
    )
    lr_warmup_steps: int = setting(10, "Steps over which the learning rate rises from zero.")
    weight_decay: float = setting(0.01, "Decoupled weight decay: each step, weights shrink by this times the rate.")
    adam_beta1: float = setting(0.9, "Decay of the gradient's running mean. Not in adafactor.")
    adam_beta2: float = setting(0.999, "Decay of the squared gradient's running mean. Not in adafactor and lion.")
    adam_epsilon: float = setting(1e-8, "Offset of Adam's denominator. Not in adafactor and lion.")
    max_grad_norm: float = setting(1.0, "Gradients are scaled down to this norm; 0 for never.")
    lr_num_cycles: int = setting(1, "Times that cosine_with_restarts runs from the peak to zero.")
    lr_power: float = setting(1.0, "Power of polynomial: 1 is a straight line, above it falls early.")
    lr_end: float = setting(1e-7, "Learning rate at which polynomial ends.")
    lion_beta2: float = setting(0.99, "Decay of lion's running mean; adam_beta1 mixes the newest gradient in.")
    prodigy_d_coef: float = setting(1.0, "Factor on the rate that prodigy finds: 0.5 is cautious, 2 bold.")

    def __post_init__(self) -> None:
        check_choice(self, "optimizer", "lr_scheduler")
        check_at_least(self, 0, "lr_warmup_steps", "weight_decay", "max_grad_norm", "lr_end")
        check_at_least(self, 1, "lr_num_cycles")
        for beta in ("adam_beta1", "adam_beta2", "lion_beta2"):
            check(0 <= getattr(self, beta) < 1, beta, getattr(self, beta), "0 to below 1")
        for name in ("adam_epsilon", "lr_power", "prodigy_d_coef"):
            check(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        _check_learning_rate(self)
        _check_course(self)


def check_warmup(optimizer: OptimizerConfig, num_steps: int) -> None:
    """A warm-up as long as the run would leave nothing of a course that falls.

    Raises:
        ConfigError: that is so.
    """
    if optimizer.lr_scheduler not in ENDLESS and optimizer.lr_warmup_steps >= num_steps:
        raise ConfigError(
            f"lr_warmup_steps is {optimizer.lr_warmup_steps} with lr_scheduler {optimizer.lr_scheduler} and "
            f"max_train_steps {num_steps}; allowed is less than max_train_steps. Usual is a tenth of it or less."
        )


def _check_learning_rate(config: OptimizerConfig) -> None:
    rate = config.learning_rate
    if config.optimizer == "prodigy":
        if not 0.1 <= rate <= 10:
            raise ConfigError(
                f"learning_rate is {rate!r} with optimizer prodigy, which finds the rate itself and multiplies it by "
                "this; allowed is 0.1 to 10. Set learning_rate to 1."
            )
        return
    allowed = "above 0 and below 1, usually 1e-4 (1 is for optimizer prodigy)"
    check(0 < rate < 1, "learning_rate", rate, allowed)


def _check_course(config: OptimizerConfig) -> None:
    name = config.lr_scheduler
    if config.optimizer == "adamw-schedulefree":
        if name not in ENDLESS:
            raise ConfigError(
                f"lr_scheduler is {name!r} with optimizer adamw-schedulefree, whose averaging of weights takes the "
                f"place of a falling rate; allowed is one of {', '.join(ENDLESS)}. Set lr_scheduler to one of them, or "
                "optimizer to adamw."
            )
        if config.adam_beta1 == 0:
            raise ConfigError(
                "adam_beta1 is 0 with optimizer adamw-schedulefree, which needs it to tell its two sets of weights "
                "apart; allowed is above 0 and below 1, usually 0.9."
            )
    if name == "constant" and config.lr_warmup_steps:
        raise ConfigError(
            f"lr_warmup_steps is {config.lr_warmup_steps} with lr_scheduler constant, which has no warm-up; allowed is "
            "0. Set lr_warmup_steps to 0, or lr_scheduler to constant_with_warmup."
        )
    if name == "polynomial" and config.lr_end >= config.learning_rate:
        raise ConfigError(
            f"lr_end is {config.lr_end!r} with learning_rate {config.learning_rate!r}; allowed is below the learning "
            "rate, which polynomial lowers to it."
        )
