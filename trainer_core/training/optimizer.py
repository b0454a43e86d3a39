"""Builds the optimizer, and turns its state into tensors with names and back: no pickle."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig
from ..errors import ConfigError, MissingPackageError, RunFolderError


def build_optimizer(parameters: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW over the adapter, whose order of parameters is the mapping's.

    Raises:
        ConfigError: the optimizer can't run on the parameters' device.
        MissingPackageError: its package is not installed.
    """
    weights = list(parameters.values())
    settings = {
        "lr": config.learning_rate,
        "betas": (config.adam_beta1, config.adam_beta2),
        "eps": config.adam_epsilon,
        "weight_decay": config.weight_decay,
    }
    device = weights[0].device.type
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, fused=device in ("cpu", "cuda"), **settings)  # type: ignore[arg-type]
    if device != "cuda":
        raise ConfigError(f"optimizer adamw-8bit needs a CUDA device, and this run is on {device}. Use adamw.")
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingPackageError("bitsandbytes", "optimizer adamw-8bit") from error
    return AdamW8bit(weights, **settings)


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state as `<parameter>/<entry>` tensors."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{name}/{entry}"] = value if isinstance(value, Tensor) else torch.tensor(value)
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
    if states.keys() != parameters.keys():
        raise RunFolderError("The checkpoint's optimizer state belongs to other layers than this run's adapter has.")
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            entry: _placed(entry, value, parameter, optimizer) for entry, value in states[name].items()
        }


def _placed(entry: str, value: Tensor, parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor | int:
    if entry == "step":
        if not isinstance(optimizer, torch.optim.AdamW):
            return int(value)  # bitsandbytes counts in a plain number
        return value.clone().to(parameter.device if optimizer.defaults["fused"] else "cpu")
    return value.to(parameter.device).clone()
