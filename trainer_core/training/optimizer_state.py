"""Optimizer state as named tensors, for saving without pickle, and the weights to validate and export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import RunFolderError

GROUP = "group"  # not the name of a parameter: those contain dots


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state as tensors named `<parameter>/<entry>` and `group/<entry>`. A group's numbers keep their 64 bits."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    group = optimizer.param_groups[0]
    # Some optimizers keep state in the group (Prodigy's `d`, schedule-free's `k`). Saving every number, not a list of
    # names, still works after a library renames one. The learning rate is set in every step.
    for entry, value in group.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and entry != "lr":
            dtype = torch.int64 if isinstance(value, int) else torch.float64
            tensors[f"{GROUP}/{entry}"] = torch.tensor(value, dtype=dtype)
    return tensors


def restore_optimizer(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], tensors: Mapping[str, Tensor]
) -> None:
    """Load the result of `optimizer_tensors` into an optimizer, on the parameters' devices.

    Raises:
        RunFolderError: the state is for other parameters.
    """
    states: dict[str, dict[str, Tensor]] = {}
    for path, value in tensors.items():
        name, _, entry = path.rpartition("/")
        states.setdefault(name, {})[entry] = value
    shared = states.pop(GROUP, {})
    if states.keys() != parameters.keys():
        raise RunFolderError(
            "The checkpoint's optimizer state does not match the layers of this run's adapter. Choose another name for "
            "this run."
        )
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            entry: _placed(entry, value, parameter, optimizer) for entry, value in states[name].items()
        }
    for entry, value in shared.items():
        optimizer.param_groups[0][entry] = value.item()


def _placed(entry: str, value: Tensor, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor | int:
    if entry == "step":
        if not isinstance(optimizer, torch.optim.AdamW):
            return int(value)  # only AdamW counts its steps in a tensor
        return value.clone().to(parameter.device if optimizer.defaults["fused"] else "cpu")
    return value.to(parameter.device).clone()


@contextmanager
def weights_to_use(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Puts schedule-free's average in place of the weights while the context lasts. Does nothing for other optimizers.

    `optimizer.train()` is not used: it restores the weights only up to rounding, so validation would change the run.
    """
    if not hasattr(optimizer, "eval"):
        yield
        return
    with restored_after(parameters):
        optimizer.eval()  # type: ignore[attr-defined]
        for group in optimizer.param_groups:
            group["train_mode"] = True
        yield


@contextmanager
def restored_after(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Restores the values of the parameters, bit for bit, when the context ends."""
    values = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        copy_into(parameters, values)


@torch.no_grad()
def copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Overwrite each tensor with the value of the same name."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
