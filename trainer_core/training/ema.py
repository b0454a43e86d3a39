"""Exponential moving average (EMA) of the adapter's float32 master weights, for validation and export.

The decay depends only on the step, so the average itself is the only state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod

import torch
from torch import Tensor, nn

from ..config import EmaConfig
from ..errors import RunFolderError
from .optimizer_state import copy_into, restored_after

Weights = Callable[[], AbstractContextManager[None]]  # puts weights into the transformer while the context lasts
TRAINED, AVERAGE = "LoRA", "EMA"  # their names in the labels of the validation grid


def start_ema(parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> dict[str, Tensor]:
    """The average before the first step: a copy of the weights by name. Empty without use_ema."""
    if not config.use_ema:
        return {}
    return {name: _current(parameter, config).clone() for name, parameter in parameters.items()}


def decay_at(step: int, config: EmaConfig) -> float:
    """Fraction of the average that the update after `step` steps keeps: step / (step + 9), at most ema_decay.

    The update after the first step keeps nothing. As in SimpleTuner, steps count, not updates.
    """
    return min(config.ema_decay, step / (step + 9)) if step > 1 else 0.0


@torch.no_grad()
def update_ema(
    average: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], step: int, config: EmaConfig
) -> None:
    """Update the average after `step` steps, if an update is due."""
    if not average or step % config.ema_update_interval:
        return
    weight = 1 - decay_at(step, config)
    torch._foreach_lerp_(list(average.values()), [_current(parameters[name], config) for name in average], weight)


def restore_ema(average: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Load a checkpoint's average.

    Raises:
        RunFolderError: it is missing or for other weights.
    """
    if average.keys() != tensors.keys():
        raise RunFolderError(
            "The checkpoint's EMA is missing or does not match this run's adapter layers. Choose another name for this "
            "run."
        )
    copy_into(average, tensors)


@contextmanager
def average_in_place(parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> Iterator[None]:
    """Puts the average in place of the weights while the context lasts, then restores them bit for bit."""
    with restored_after(parameters):
        copy_into(parameters, average)
        yield


def weights_to_validate(trained: Weights, average: Weights, config: EmaConfig) -> dict[str, Weights]:
    """The weights that ema_validation selects, by name: TRAINED, AVERAGE or both."""
    if not config.use_ema or config.ema_validation == "none":
        return {TRAINED: trained}
    return {AVERAGE: average} if config.ema_validation == "ema_only" else {TRAINED: trained, AVERAGE: average}


def ema_bytes(shapes: Iterable[Sequence[int]], config: EmaConfig) -> tuple[int, int]:
    """Bytes of the average on the host and on the accelerator, for an adapter of these shapes.

    Validation and export of the average temporarily need the adapter's own size on the accelerator too.
    """
    size = 4 * sum(map(prod, shapes)) if config.use_ema else 0
    return (size, 0) if config.ema_device == "cpu" else (0, size)


def _current(parameter: nn.Parameter, config: EmaConfig) -> Tensor:
    device = "cpu" if config.ema_device == "cpu" else parameter.device
    return parameter.detach().to(device, torch.float32)
