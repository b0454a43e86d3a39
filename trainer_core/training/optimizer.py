"""Create the optimizer from the library that has it, and calculate the size of its state."""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ..config import OptimizerConfig, OptimizerName
from ..errors import ConfigError, MissingPackageError
from ..packages import check_package, explained_imports

Builder = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Bytes of state per element of a float32 parameter. For the other optimizers they depend on the shape.
_STATE_BYTES: dict[OptimizerName, int] = {"adamw": 8, "lion": 4, "prodigy": 16, "adamw-schedulefree": 8}
_SMALLEST_8BIT = 4096  # elements; bitsandbytes keeps smaller tensors in 32 bits
_BLOCK_8BIT = 256  # elements that share one 32-bit scale in each of the two states


def optimizer_builder(config: OptimizerConfig, device: torch.device) -> Builder:
    """A function that creates the optimizer for a list of weights. Call this before a model is loaded, to fail early.

    Raises:
        ConfigError: the optimizer can't run on the device.
        MissingPackageError: its package is not installed.
    """
    rate_and_decay = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    adam = {**rate_and_decay, "betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    match config.optimizer:
        case "adamw":
            return partial(torch.optim.AdamW, fused=device.type in ("cpu", "cuda"), **adam)
        case "adamw-8bit":
            if device.type != "cuda":
                raise ConfigError(
                    f"optimizer 'adamw-8bit' must run on a CUDA device, got {device}. Set optimizer to adamw, or to "
                    "lion or adafactor for less VRAM."
                )
            return partial(_library("bitsandbytes", config).optim.AdamW8bit, **adam)
        case "adafactor":  # Shazeer and Stern 2018
            with explained_imports("transformers"):
                from transformers.optimization import Adafactor

            # Its own learning rates scale with the weights' size, so LoRA's B would hardly leave its initial zero.
            return partial(Adafactor, scale_parameter=False, relative_step=False, **rate_and_decay)
        case "lion":  # Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"
            betas = (config.adam_beta1, config.lion_beta2)
            return partial(_library("lion-pytorch", config).Lion, betas=betas, **rate_and_decay)
        case "prodigy":
            return _prodigy(adam, config)
        case "adamw-schedulefree":
            return _schedule_free(adam, config)


def _library(package: str, config: OptimizerConfig) -> Any:
    check_package(package)
    try:
        return importlib.import_module(package.replace("-", "_"))
    except ImportError as error:
        raise MissingPackageError(package, f"optimizer {config.optimizer}") from error


def _prodigy(settings: dict[str, Any], config: OptimizerConfig) -> Builder:
    """Builds Prodigy (Mishchenko and Defazio 2023). A warm-up turns on `safeguard_warmup`, as its authors advise."""
    kind = _library("prodigyopt", config).Prodigy

    def build(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its kind of weight decay
            return kind(weights, d_coef=config.prodigy_d_coef, safeguard_warmup=config.lr_warmup_steps > 0, **settings)

    return build


def _schedule_free(settings: dict[str, Any], config: OptimizerConfig) -> Builder:
    """Builds schedule-free AdamW (Defazio et al. 2024). The warm-up is in the learning rate of each step."""
    kind = _library("schedulefree", config).AdamWScheduleFree

    def build(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = kind(weights, **settings)
        optimizer.train()
        return optimizer

    return build


def skip_update_if(optimizer: torch.optim.Optimizer, is_wrong: Tensor) -> bool:
    """Let the optimizer's next step change nothing if `is_wrong` [] is 1, which the device finds out without the host.

    Returns whether the optimizer can do that: torch's fused ones can, for gradient scaling.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer.found_inf = is_wrong  # type: ignore[attr-defined]
    return True


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the next step's rate. Returns the effective rate: `rate` times Prodigy's estimate `d`, if there is one."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate * optimizer.param_groups[0].get("d", 1.0)


def optimizer_bytes(name: OptimizerName, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of optimizer state for float32 parameters of these shapes, without the parameters and their gradients.

    Validation and export with adamw-schedulefree temporarily need another 4 bytes per element.
    """
    return sum(_state_bytes(name, shape) for shape in shapes)


def _state_bytes(name: OptimizerName, shape: Sequence[int]) -> int:
    count = prod(shape)
    if name == "adafactor":  # sums of a matrix's rows and columns
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    if name == "adamw-8bit":
        return 8 * count if count < _SMALLEST_8BIT else 2 * count + 8 * -(-count // _BLOCK_8BIT)
    return _STATE_BYTES[name] * count
