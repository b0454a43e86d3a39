"""Builds the optimizer out of the library that has it, and says what its state weighs."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
from torch import nn

from ..config import OptimizerConfig, OptimizerName
from ..errors import ConfigError, MissingPackageError

Builder = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

# Bytes of state per element of a float32 parameter; adafactor keeps sums of rows and columns instead.
STATE_BYTES: dict[OptimizerName, int] = {
    "adamw": 8,
    "adamw-8bit": 2,
    "adafactor": 0,
    "lion": 4,
    "prodigy": 16,
    "adamw-schedulefree": 8,
}
_SMALLEST_8BIT = 4096  # elements; bitsandbytes keeps smaller tensors in 32 bits
_BLOCK_8BIT = 256  # elements that share one 32-bit scale in each of its two states


def optimizer_builder(config: OptimizerConfig, device: torch.device) -> Builder:
    """What makes the optimizer of a list of weights: asked for before a model is loaded, it fails early.

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
            return _adamw_8bit(adam, device)
        case "adafactor":
            return _adafactor(rate_and_decay)
        case "lion":
            return _lion({**rate_and_decay, "betas": (config.adam_beta1, config.lion_beta2)})
        case "prodigy":
            return _prodigy(adam, config)
        case "adamw-schedulefree":
            return _schedule_free(adam)


def _adamw_8bit(settings: dict[str, Any], device: torch.device) -> Builder:
    if device.type != "cuda":
        raise ConfigError(
            f"optimizer 'adamw-8bit' must run on a CUDA device, got {device}. Set optimizer to adamw, or to lion or "
            "adafactor for less memory."
        )
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise MissingPackageError("bitsandbytes", "optimizer adamw-8bit") from error
    return partial(AdamW8bit, **settings)


def _adafactor(settings: dict[str, Any]) -> Builder:
    """Shazeer and Stern 2018 with the rate from outside. Rates relative to the weights' size would hold B at zero."""
    from transformers.optimization import Adafactor

    return partial(Adafactor, scale_parameter=False, relative_step=False, **settings)


def _lion(settings: dict[str, Any]) -> Builder:
    """Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"."""
    try:
        from lion_pytorch import Lion
    except ImportError as error:
        raise MissingPackageError("lion-pytorch", "optimizer lion") from error
    return partial(Lion, **settings)


def _prodigy(settings: dict[str, Any], config: OptimizerConfig) -> Builder:
    """Mishchenko and Defazio 2023, with what its authors advise under a warm-up."""
    try:
        from prodigyopt import Prodigy
    except ImportError as error:
        raise MissingPackageError("prodigyopt", "optimizer prodigy") from error

    def build(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        with contextlib.redirect_stdout(io.StringIO()):  # it announces its weight decay
            return Prodigy(
                weights, d_coef=config.prodigy_d_coef, safeguard_warmup=config.lr_warmup_steps > 0, **settings
            )

    return build


def _schedule_free(settings: dict[str, Any]) -> Builder:
    """Defazio et al. 2024, "The Road Less Scheduled". The warm-up comes with the learning rate of each step."""
    try:
        from schedulefree import AdamWScheduleFree
    except ImportError as error:
        raise MissingPackageError("schedulefree", "optimizer adamw-schedulefree") from error

    def build(weights: list[nn.Parameter]) -> torch.optim.Optimizer:
        optimizer = AdamWScheduleFree(weights, **settings)
        optimizer.train()
        return optimizer

    return build


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> float:
    """Set the next step's rate; the rate in effect, which where the optimizer finds it is its estimate times `rate`."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    return rate * optimizer.param_groups[0].get("d", 1.0)


def optimizer_bytes(name: OptimizerName, shapes: Iterable[Sequence[int]]) -> int:
    """Bytes of optimizer state for float32 parameters of these shapes, without gradients and the weights themselves.

    While adamw-schedulefree's averaged weights are validated or exported, 4 bytes an element come on top.
    """
    return sum(_state_bytes(name, shape) for shape in shapes)


def _state_bytes(name: OptimizerName, shape: Sequence[int]) -> int:
    count = prod(shape)
    if name == "adafactor":
        return 4 * (count // shape[-1] + count // shape[-2] if len(shape) > 1 else count)
    if name == "adamw-8bit":
        return 8 * count if count < _SMALLEST_8BIT else 2 * count + 8 * -(-count // _BLOCK_8BIT)
    return STATE_BYTES[name] * count
