"""Quantises frozen linear layers with optimum-quanto or bitsandbytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatch
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from ..config import BaseModelPrecision
from ..errors import MissingPackageError
from ..events import Observer, raise_if_stopped
from ..weights.stored import StoredWeight
from .frozen_linear import FrozenLinear

Convert = Callable[[nn.Linear, torch.device], nn.Module]
_QUANTO_TYPES = {"int8-quanto": "qint8", "int4-quanto": "qint4", "int2-quanto": "qint2", "fp8-quanto": "qfloat8"}


def quantise(
    network: nn.Module,
    precision: BaseModelPrecision,
    keep: Sequence[str],
    device: torch.device,
    observer: Observer,
) -> None:
    """Quantise the linear layers of `network` in place, except those whose names match a pattern in `keep`.

    Layers move to `device` one at a time, so that the unquantised network never has to fit there.

    Raises:
        MissingPackageError: the precision needs a package that is not installed.
        Interrupted: the observer wants to stop.
    """
    convert = converter(precision)
    if convert is None:
        return
    layers = list(_linears(network, keep))
    for done, (parent, name) in enumerate(layers):
        raise_if_stopped(observer)
        setattr(parent, name, convert(getattr(parent, name), device))
        observer.on_progress(f"Quantising to {precision}", done + 1, len(layers))


def converter(precision: BaseModelPrecision) -> Convert | None:
    """A function that quantises a linear layer on a device; None if this precision needs no conversion.

    Raises:
        MissingPackageError: the precision needs a package that is not installed.
    """
    if precision in ("none", "file"):
        return None
    if precision == "nf4-bnb":
        _need("bitsandbytes", "bitsandbytes", precision)
        return _to_nf4
    _need("optimum.quanto", "optimum-quanto", precision)
    return partial(_to_quanto, _QUANTO_TYPES[precision])


def is_kept(name: str, keep: Sequence[str]) -> bool:
    """Whether a layer stays unquantised: its full name matches one of the patterns in `keep`."""
    return any(fnmatch(name, pattern) for pattern in keep)


def _linears(network: nn.Module, keep: Sequence[str]) -> Iterator[tuple[nn.Module, str]]:
    for parent_name, parent in network.named_modules():
        for name, child in parent.named_children():
            full_name = f"{parent_name}.{name}" if parent_name else name
            if type(child) is nn.Linear and not is_kept(full_name, keep):
                yield parent, name


def _need(module: str, package: str, precision: str) -> None:
    above, _, _ = module.partition(".")
    if find_spec(above) is None or find_spec(module) is None:
        raise MissingPackageError(package, f"The precision {precision}")


def _to_quanto(type_name: str, layer: nn.Linear, device: torch.device) -> nn.Module:
    from optimum.quanto import freeze, qtypes
    from optimum.quanto.nn import QLinear

    layer, codes = layer.to(device), qtypes[type_name]
    if codes.bits == 8:
        return _to_quanto_codes(layer, codes)
    quantised = QLinear.from_module(layer, weights=codes)
    freeze(quantised)
    return quantised.requires_grad_(False)  # noqa: FBT003


def _to_quanto_codes(layer: nn.Linear, codes: Any) -> FrozenLinear:
    """Quanto's 8-bit codes and row scales in a FrozenLinear, which keeps no input for the backward pass."""
    from optimum.quanto import AbsmaxOptimizer, quantize_weight

    scale = AbsmaxOptimizer()(layer.weight.data, qtype=codes, axis=0)
    weight: Any = quantize_weight(layer.weight.data, qtype=codes, axis=0, scale=scale, optimized=False)
    return FrozenLinear(StoredWeight(weight._data, scale.float()), layer.bias)


def _to_nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = layer.weight
    quantised = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,  # pyright: ignore[reportUnnecessaryComparison]  # torch's stub omits None
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    quantised.weight = Params4bit(
        weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantised
    )
    quantised.bias = layer.bias
    # On some CPUs, a forward without gradients would reorder the weights, and a later backward would not work.
    quantised.support_avx512bf16_for_cpu = False
    return quantised.to(device)
