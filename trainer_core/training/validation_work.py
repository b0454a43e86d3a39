"""How often a run validates and which forward passes that takes, from settings and sizes alone."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace

from ..config import EmaConfig, ValidationConfig
from .ema import weights_to_validate
from .strengths import STRENGTHS
from .validation import LOSS_SIGMAS


@dataclass(frozen=True, slots=True)
class Passes:
    """`count` forward passes of one pair without gradients. `image`: tokens of target and references. `text`: tokens of
    the prompt."""

    image: int
    text: int
    count: int


@dataclass(frozen=True, slots=True)
class ValidationWork:
    """Forward passes of a run's validations. `each`: those of every validation. `first`: what the run's very first
    validation adds for the base model's pictures, which are then kept. `last`: at most what comparing strengths takes.
    `times`: how often the run still validates."""

    each: tuple[Passes, ...]
    first: tuple[Passes, ...]
    last: tuple[Passes, ...]
    times: int

    @property
    def total(self) -> tuple[Passes, ...]:
        """The passes of all validations together."""
        return (*self.first, *_times(self.each, self.times), *self.last)


def validation_is_due(config: ValidationConfig, step: int, max_train_steps: int) -> bool:
    """Whether a run validates after this step. Steps count from 1."""
    interval = config.validation_step_interval
    return step == max_train_steps or (interval > 0 and step % interval == 0)


def validation_work(
    config: ValidationConfig,
    ema: EmaConfig,
    *,
    max_train_steps: int,
    held_out: Iterable[Passes],
    pictures: Iterable[Passes],
    done: int = 0,
) -> ValidationWork:
    """The work of the validations after step `done`.

    The counts of `held_out` are numbers of held-out pairs, those of `pictures` are numbers of pictures that one set of
    weights draws (pairs x captions x sizes). Guidance adds a pass with the negative prompt to each sampling step; it
    counts like one with the prompt, which is a few tokens longer.
    """
    losses, shots = tuple(held_out), tuple(pictures)
    if not losses:  # nothing is validated then
        return ValidationWork((), (), (), 0)
    how = config.drawing
    drawing = _times(shots, how.steps * (2 if how.guidance > 1 else 1))
    variants = len(weights_to_validate(nullcontext, nullcontext, ema))
    compared = drawing if config.compares_strengths else ()
    interval = config.validation_step_interval or max_train_steps
    last = max_train_steps > done and max_train_steps % interval > 0
    times = max(0, max_train_steps // interval - done // interval) + last
    return ValidationWork(
        each=_times((*_times(losses, len(LOSS_SIGMAS)), *drawing), variants),
        first=drawing if times and done < interval else (),
        last=_times(compared, len(STRENGTHS)) if times else (),
        times=times,
    )


def _times(passes: Iterable[Passes], factor: int) -> tuple[Passes, ...]:
    return tuple(replace(each, count=each.count * factor) for each in passes)
