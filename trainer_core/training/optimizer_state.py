"""The optimizer's state as tensors with names and back: no pickle. And the weights that others should see."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import RunFolderError

GROUP = "group"  # no parameter's name: those have dots
_SET_EVERY_STEP = "lr"


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state as `<parameter>/<entry>` and `group/<entry>` tensors; Python's numbers keep their 64 bits."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    group = optimizer.param_groups[0]
    # All numbers by whatever names: some optimizers count or estimate in here (Prodigy's `d`, schedule-free's `k`), and
    # a list of names would miss the one that a library's next version renames.
    for entry, value in group.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and entry != _SET_EVERY_STEP:
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            tensors[f"{GROUP}/{entry}"] = torch.tensor(value, dtype=dtype)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Put `optimizer_tensors` back, on the parameters' devices and in their own types.

    Raises:
        RunFolderError: the state belongs to other parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, entry = path.rpartition("/")
        states.setdefault(name, {})[entry] = value
    shared = states.pop(GROUP, {})
    if states.keys() != parameters.keys():
        raise RunFolderError("The checkpoint's optimizer state belongs to other layers than this run's adapter has.")
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            entry: _placed(entry, value, parameter, optimizer) for entry, value in states[name].items()
        }
    for entry, value in shared.items():
        optimizer.param_groups[0][entry] = value.item()


def _placed(entry: str, value: Tensor, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor | int:
    if entry == "step":
        if not isinstance(optimizer, torch.optim.AdamW):
            return int(value)  # all others count in a plain number
        return value.clone().to(parameter.device if optimizer.defaults["fused"] else "cpu")
    return value.to(parameter.device).clone()


@contextmanager
def weights_to_use(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """The weights to validate and export while the context lasts: schedule-free's average, all others' own.

    The trained ones come back bit for bit. The optimizer's own way back is a sum in floating point, after which a run
    that was validated would no longer equal one that was not.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    trained = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(trained[name])
        for group in optimizer.param_groups:
            group["train_mode"] = True
