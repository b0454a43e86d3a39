"""Chooses the numbers that quantised layers multiply in a run: 8 bits or bf16. A run keeps its choice."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .conditioning.batches import BatchLoader
from .config import MatmulPrecision, ModelConfig
from .device import seconds_on_device
from .dry_step import no_graphs_because
from .errors import TrainerError
from .memory.streaming import weights_on_device
from .planning.advice import STEP
from .planning.preparation import Preparation
from .planning.workload import largest_draws
from .precision.eight_bit import check_device
from .precision.frozen_linear import FrozenLinear, set_products
from .ranks import Ranks
from .runs.folder import RunFolder
from .training.step import Networks, rehearse

_LOG = logging.getLogger(__name__)
_SETTING = "matmul_precision"  # also in run.json, with the choice
# Least cosine between the adapter's gradients with 8-bit and with bf16 products. Weights in NF4 alone have 0.993
# (benchmarks/precisions_cpu_2026-11.md).
LEAST_COSINE = 0.99


class Likeness(NamedTuple):
    """The cosine of two sets of gradients, and the norm of their difference relative to the second one's."""

    cosine: float
    error: float


def kept_choice(model: ModelConfig, run: RunFolder) -> MatmulPrecision:
    """The numbers that this run multiplies; `auto` if that is not decided yet.

    A run that an older version has begun goes on with bf16, and `auto` rounds nothing in a run in float32.
    """
    if model.matmul_precision != "auto":
        return model.matmul_precision
    if model.mixed_precision == "no":
        return "bf16"
    known = run.state().get(_SETTING)
    return known if known in ("bf16", "8bit") else "bf16" if run.steps_done() else "auto"


def check_choice(model: ModelConfig, run: RunFolder, device: torch.device) -> None:
    """Check that a run that has begun with 8-bit products can go on with them on this device.

    Raises:
        ConfigError: it can't.
        MissingPackageError: Triton is not installed.
    """
    if kept_choice(model, run) == "8bit":
        instead = f"Continue it where it began, or start a new run with {_SETTING} bf16."
        check_device(device, "This run, which began with 8-bit products,", instead)


def choose_products(
    prepared: Preparation, networks: Networks, loader: BatchLoader, run: RunFolder, ranks: Ranks
) -> MatmulPrecision:
    """Let the network multiply as `matmul_precision` says. With `auto`, choose once, write it to run.json and log why.
    Returns the choice.

    `auto` takes 8 bits if a layer's products are faster that way at this run's size, and if the adapter's gradients of
    the largest pairs stay alike. Every process of `ranks` gets the leader's choice.

    Raises:
        OutOfMemoryError: the largest pairs don't fit into memory.
        LostRankError: another process has ended or hangs.
    """
    layers = [layer for layer in networks.transformer.modules() if isinstance(layer, FrozenLinear)]
    if not layers:
        return "bf16"
    choice = kept_choice(prepared.config.model, run)
    if choice == "auto":
        is_able = all(able for (able,) in ranks.all_gather_ints([_is_able(networks.device)]))
        with prepared.explain_memory_errors(STEP, "in a dry step of the largest pairs", "Nothing is lost."):
            wants = is_able and ranks.leads and _wants_8_bits(prepared, networks, loader, layers)
        choice = "8bit" if ranks.all_gather_ints([wants])[0][0] else "bf16"
    set_products(networks.transformer, networks.device, in_8_bits=choice == "8bit")
    run.write_state(**{_SETTING: choice})
    return choice


def _is_able(device: torch.device) -> bool:
    """Whether 8-bit products could be faster on this device. Logs why not, unless it is no CUDA device."""
    if device.type != "cuda":
        return False
    try:
        check_device(device, "An 8-bit product", "")
    except TrainerError as error:
        _LOG.info("Quantised layers multiply bf16 numbers. %s", str(error).strip())
        return False
    return True


def _wants_8_bits(prepared: Preparation, networks: Networks, loader: BatchLoader, layers: list[FrozenLinear]) -> bool:
    tokens = prepared.work.tokens
    layer = max(layers, key=lambda each: each.in_features)
    exact, fast = (1000 * _layer_seconds(networks, layer, tokens.batch * tokens.image, in_8_bits=on) for on in (0, 1))
    times = f"the products of a layer with {layer.in_features} inputs take {fast:.2f} ms in 8 bits and {exact:.2f} ms"
    if fast >= exact:
        _LOG.info("Quantised layers multiply bf16 numbers: %s in bf16.", times)
        return False
    right, ours = (_rehearsed(prepared, networks, loader, in_8_bits=on) for on in (False, True))
    if ours.seconds >= right.seconds and (reason := no_graphs_because(prepared, networks.device)):
        # 8-bit products launch more kernels. CUDA graphs would launch them all at once.
        text = (
            "Quantised layers multiply bf16 numbers: a step takes %.2f s in 8 bits and %.2f s in bf16, and it can't be "
            "a CUDA graph, because %s."
        )
        _LOG.info(text, ours.seconds, right.seconds, reason)
        return False
    alike = likeness(ours.gradients, right.gradients)
    is_alike = alike.cosine >= LEAST_COSINE
    _LOG.info(
        "Quantised layers multiply %s numbers: %s in bf16, and the adapter's gradients have a cosine of %.4f with "
        "those of bf16 (at least %.2f is needed) and a relative error of %.3f.",
        *("8-bit" if is_alike else "bf16", times, alike.cosine, LEAST_COSINE, alike.error),
    )
    return is_alike


class _Rehearsed(NamedTuple):
    """Seconds of a micro-batch, and the adapter's gradients in host memory."""

    seconds: float
    gradients: dict[str, Tensor]


def _rehearsed(prepared: Preparation, networks: Networks, loader: BatchLoader, *, in_8_bits: bool) -> _Rehearsed:
    """A micro-batch of the largest pairs, without CUDA graphs."""
    set_products(networks.transformer, networks.device, in_8_bits=in_8_bits)
    batch = loader.read(largest_draws(prepared.encoded, prepared.work))

    def once() -> dict[str, Tensor]:
        return {name: each.cpu() for name, each in rehearse(networks, batch, prepared.config).items()}

    once()  # libraries choose their kernels in the first
    began = time.perf_counter()
    gradients = once()
    return _Rehearsed(time.perf_counter() - began, gradients)


def _layer_seconds(networks: Networks, layer: FrozenLinear, rows: int, *, in_8_bits: int) -> float:
    """Seconds of a layer's forward and backward pass of so many tokens."""
    set_products(layer, networks.device, in_8_bits=bool(in_8_bits))
    dtype = networks.transformer.proj_out.weight.dtype
    x = torch.randn(rows, layer.in_features, device=networks.device, dtype=dtype, requires_grad=True)
    gradient = torch.randn(rows, layer.out_features, device=networks.device, dtype=dtype)
    with weights_on_device(layer):
        return seconds_on_device(networks.device, lambda: torch.autograd.grad(layer(x), x, gradient))


def likeness(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Likeness:
    """How alike two sets of gradients with the same names are, as if each were one vector."""
    along = ours = theirs = apart = 0.0
    for name, right in wanted.items():
        one, other = found[name].flatten().double(), right.flatten().double()
        along, ours, theirs = along + float(one @ other), ours + float(one @ one), theirs + float(other @ other)
        apart += float((one - other).square().sum())
    return Likeness(along / max(ours * theirs, 1e-300) ** 0.5, (apart / max(theirs, 1e-300)) ** 0.5)
