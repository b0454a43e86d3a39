"""A running average of the adapter's weights (EMA), kept beside them and put in their place to validate and export.

The average is float32 whatever the weights are: a step changes a weight by less than bfloat16 can tell. How much an
update keeps is a function of the step alone, so the average is all the state there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import prod

import torch
from torch import Tensor, nn

from ..config import EmaConfig
from ..errors import RunFolderError

Weights = Callable[[], AbstractContextManager[None]]  # in the transformer while the context lasts
TRAINED, AVERAGE = "LoRA", "EMA"


def start_ema(parameters: Mapping[str, nn.Parameter], config: EmaConfig) -> dict[str, Tensor]:
    """The average before the first step: a copy of the weights, by the same names. Empty without use_ema."""
    if not config.use_ema:
        return {}
    return {name: _current(parameter, config).clone() for name, parameter in parameters.items()}


def decay_at(step: int, config: EmaConfig) -> float:
    """The share that the update after `step` steps keeps: from 2/11 up to ema_decay."""
    update = step // config.ema_update_interval
    return min(config.ema_decay, (1 + update) / (10 + update))


@torch.no_grad()
def update_ema(
    average: dict[str, Tensor], parameters: Mapping[str, nn.Parameter], step: int, config: EmaConfig
) -> None:
    """Move the average towards the weights after `step` steps, if that is one of its updates."""
    if step % config.ema_update_interval:
        return
    weight = 1 - decay_at(step, config)
    for name, mean in average.items():
        mean.lerp_(_current(parameters[name], config), weight)


def restore_ema(average: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Put a checkpoint's average back.

    Raises:
        RunFolderError: it belongs to other weights, or there is none.
    """
    if average.keys() != tensors.keys():
        raise RunFolderError(
            "The checkpoint's running average (EMA) belongs to other layers than this run's adapter has."
        )
    for name, mean in average.items():
        mean.copy_(tensors[name])


@contextmanager
def average_in_place(parameters: Mapping[str, nn.Parameter], average: Mapping[str, Tensor]) -> Iterator[None]:
    """The average in the place of the weights while the context lasts; then they are back bit for bit."""
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    _copy(parameters, average)
    try:
        yield
    finally:
        _copy(parameters, trained)


def weights_to_validate(trained: Weights, average: Weights, config: EmaConfig) -> dict[str, Weights]:
    """By the name of their column: the trained weights, their average, or both, as ema_validation says."""
    if not config.use_ema or config.ema_validation == "none":
        return {TRAINED: trained}
    return {AVERAGE: average} if config.ema_validation == "ema_only" else {TRAINED: trained, AVERAGE: average}


def ema_bytes(shapes: Iterable[Sequence[int]], config: EmaConfig) -> tuple[int, int]:
    """Bytes on the host and on the accelerator for an adapter of these shapes.

    While the average is validated or exported, the adapter's own bytes come on top on the accelerator.
    """
    size = 4 * sum(map(prod, shapes)) if config.use_ema else 0
    return (size, 0) if config.ema_device == "cpu" else (0, size)


def _current(parameter: nn.Parameter, config: EmaConfig) -> Tensor:
    device = "cpu" if config.ema_device == "cpu" else parameter.device
    return parameter.detach().to(device, torch.float32)


@torch.no_grad()
def _copy(parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])
