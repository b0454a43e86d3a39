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
from ..packages import check_package
from .formats import EightBits, Nf4, Packed, QuantisedWeight
from .frozen_linear import FrozenLinear

Convert = Callable[[nn.Linear, torch.device], FrozenLinear]
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
    check_package(package)


def _to_quanto(type_name: str, layer: nn.Linear, device: torch.device) -> FrozenLinear:
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qtypes, quantize_weight

    layer, codes = layer.to(device), qtypes[type_name]
    weight = layer.weight.data
    if codes.bits == 8:
        scale = AbsmaxOptimizer()(weight, qtype=codes, axis=0)
        made: Any = quantize_weight(weight, qtype=codes, axis=0, scale=scale, optimized=False)
        return FrozenLinear(QuantisedWeight(EightBits(), {"codes": made._data, "scale": scale.float()}), layer.bias)
    group = _group(layer.in_features)
    scale, shift = MaxOptimizer()(weight, qtype=codes, axis=0, group_size=group)
    made = quantize_weight(weight, codes, 0, scale, shift, group_size=group, optimized=False)
    form = Packed(layer.out_features, layer.in_features, codes.bits, group or layer.in_features)
    tensors = {"codes": made._data._data, "scale": made._scale, "shift": made._shift}
    return FrozenLinear(QuantisedWeight(form, tensors), layer.bias)


def _group(columns: int) -> int | None:
    """The weights of a row that share a scale, as in quanto's own linear layer; None for the whole row."""
    return next((size for size in (128, 96, 64, 32) if columns > 128 and columns % size == 0), None)


def _to_nf4(layer: nn.Linear, device: torch.device) -> FrozenLinear:
    from bitsandbytes.functional import quantize_4bit

    layer = layer.to(device)
    codes, state = quantize_4bit(layer.weight.data, quant_type="nf4", compress_statistics=True)
    form = Nf4(layer.out_features, layer.in_features, state.blocksize, state.state2.blocksize)
    tensors = {
        "codes": codes,
        "absmax": state.absmax,
        "quant_map": state.code,
        "nested_absmax": state.state2.absmax,
        "nested_map": state.state2.code,
        "offset": state.offset,
    }
    return FrozenLinear(QuantisedWeight(form, tensors), layer.bias)
