"""Frozen weights in fewer bits, layer by layer, through optimum-quanto and bitsandbytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatch

import torch
from torch import nn

from ..config import BaseModelPrecision
from ..errors import MissingPackageError
from ..events import Observer, raise_if_stopped


def quantise(
    network: nn.Module,
    precision: BaseModelPrecision,
    keep: Sequence[str],
    device: torch.device,
    observer: Observer,
) -> None:
    """Replace the weights of `network`'s linear layers in place, except those whose names match `keep`.

    Layers are moved to `device` one at a time, so the unquantised network never has to fit there.

    Raises:
        MissingPackageError: the precision's package is not installed.
        Interrupted: the observer wants to stop.
    """
    if precision == "none":
        return
    layers = list(_linears(network, keep))
    convert = _to_int8_quanto if precision == "int8-quanto" else _to_nf4
    for done, (parent, name) in enumerate(layers):
        raise_if_stopped(observer)
        setattr(parent, name, convert(getattr(parent, name), device))
        observer.on_progress(f"Quantising to {precision}", done + 1, len(layers))


def _linears(network: nn.Module, keep: Sequence[str]) -> Iterator[tuple[nn.Module, str]]:
    for parent_name, parent in network.named_modules():
        for name, child in parent.named_children():
            full_name = f"{parent_name}.{name}" if parent_name else name
            if type(child) is nn.Linear and not any(fnmatch(full_name, pattern) for pattern in keep):
                yield parent, name


def _to_int8_quanto(layer: nn.Linear, device: torch.device) -> nn.Module:
    try:
        from optimum.quanto import freeze, qint8
        from optimum.quanto.nn import QLinear
    except ImportError as error:
        raise MissingPackageError("optimum-quanto", "base_model_precision int8-quanto") from error
    quantised = QLinear.from_module(layer.to(device), weights=qint8)
    freeze(quantised)
    return quantised.requires_grad_(False)  # noqa: FBT003


def _to_nf4(layer: nn.Linear, device: torch.device) -> nn.Module:
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise MissingPackageError("bitsandbytes", "base_model_precision nf4-bnb") from error
    weight = layer.weight
    quantised = Linear4bit(
        layer.in_features,
        layer.out_features,
        bias=layer.bias is not None,
        compute_dtype=weight.dtype,
        quant_type="nf4",
        device="meta",
    )
    quantised.weight = Params4bit(
        weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=quantised
    )
    quantised.bias = layer.bias
    return quantised.to(device)
