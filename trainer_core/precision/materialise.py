"""Loads the weights of a network that was built on the meta device: reads, quantises and places them block by block."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import BaseModelPrecision
from ..errors import ModelFileError
from ..events import Observer, raise_if_stopped, watched
from ..weights.stored import Read, StoredWeight, WeightSource
from .formats import EightBits, QuantisedWeight
from .frozen_linear import FrozenLinear
from .one_buffer import move_to_host
from .quantise import Convert, converter, is_kept
from .quantised_cache import QuantisedCache

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Precision and device of a network's weights.

    Weights that are not quantised get `dtype`; layers whose names match a pattern in `keep` are never quantised.
    `quantise_on` is the device that quantises. The weights then go to `device`, or to host memory for modules whose
    names begin with one of `on_host`. With `quantise_inputs`, 8-bit layers also round their inputs.
    """

    precision: BaseModelPrecision
    dtype: torch.dtype
    device: torch.device
    quantise_on: torch.device
    keep: tuple[str, ...] = ()
    on_host: tuple[str, ...] = ()
    quantise_inputs: bool = False

    def is_on_host(self, name: str) -> bool:
        """Whether a module's weights go to host memory."""
        return self.device.type == "cpu" or name.startswith(self.on_host)

    def device_of(self, name: str) -> torch.device:
        """The device that a module's weights go to."""
        return torch.device("cpu") if self.is_on_host(name) else self.device


def materialise(
    network: nn.Module,
    source: WeightSource,
    placement: Placement,
    phase: str,
    observer: Observer,
    cache: QuantisedCache | None = None,
) -> nn.Module:
    """Load every parameter of `network`, which is on the meta device. Returns it frozen, in eval mode.

    To keep the peak of host memory low, at most one block is unquantised at a time, the file is reopened for each block
    (which drops its memory map), and a finished block in host memory is one allocation. Quantised weights are read from
    `cache` if it has them, and written to it otherwise.

    Raises:
        ModelFileError: a weight is missing or has the wrong shape.
        MissingPackageError: the precision needs a package that is not installed.
        Interrupted: the observer wants to stop.
    """
    check_weight_shapes(network, source)
    # First, while no layer is quantised: in eval(), bitsandbytes' layers repack their weights on some CPUs.
    network.eval()
    convert = converter(placement.precision)
    groups = _groups(network)
    observer.on_progress(phase, 0, len(groups))
    with cache.opened(len(groups)) if cache and convert else nullcontext() as entry:
        for done, names in enumerate(groups):
            raise_if_stopped(observer)
            known = entry.read(done, placement.quantise_on) if entry else {}
            made: dict[str, QuantisedWeight] = {}
            with source.opened() as read:
                for name in watched(names, observer):
                    _fill(network, name, read, placement, _Quantised(convert, known, made if entry else None))
            move_to_host(network.get_submodule(name) for name in names if placement.is_on_host(name))
            if entry and not known:
                entry.write(done, made)
            observer.on_progress(phase, done + 1, len(groups))
    for layer in network.modules():
        if isinstance(layer, FrozenLinear):
            layer.rounds_input = placement.quantise_inputs
    return network.requires_grad_(False)  # noqa: FBT003


def check_weight_shapes(network: nn.Module, source: WeightSource) -> None:
    """Check that the file has all of the network's weights in the right shapes. Reads no weight.

    Raises:
        ModelFileError: a weight is missing or has the wrong shape; the message names the first ones.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    missing = [name for name in wanted if name not in source.shapes]
    if missing:
        raise ModelFileError(
            f"{source.place.name} lacks {len(missing)} of {len(wanted)} weights, such as "
            f"{', '.join(missing[:_SHOWN])}. It is incomplete or belongs to another model. Download it again."
        )
    other = [name for name, shape in wanted.items() if source.shapes[name] != shape]
    if other:
        name = other[0]
        raise ModelFileError(
            f"{source.place.name} has {len(other)} weights of the wrong shape, such as {name} with "
            f"{list(source.shapes[name])} instead of {list(wanted[name])}. It belongs to another model; choose the "
            "file of this one."
        )


def _groups(network: nn.Module) -> list[list[str]]:
    """Names of the modules that own parameters, grouped by block (`transformer_blocks.3`)."""
    groups: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            parts = name.split(".")
            number = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
            groups.setdefault(".".join(parts[: number + 1]), []).append(name)
    return list(groups.values())


class _Quantised(NamedTuple):
    """How a block's layers are quantised.

    `known` has the layers that the cache holds, `convert` quantises all others, and `made` collects these for the
    cache; None if nothing is cached.
    """

    convert: Convert | None
    known: dict[str, QuantisedWeight]
    made: dict[str, QuantisedWeight] | None


def _fill(network: nn.Module, name: str, read: Read, placement: Placement, quantised: _Quantised) -> None:
    module = network.get_submodule(name)
    if name in quantised.known:
        layer = _known(module, name, read, placement, quantised.known[name])
        _replace(network, name, _moved(layer, name, placement))
        return
    stored = {each: read(f"{name}.{each}" if name else each) for each, _ in module.named_parameters(recurse=False)}
    may_change = type(module) is nn.Linear and not is_kept(name, placement.keep)
    if may_change and placement.precision == "file" and stored["weight"].is_quantised:
        _replace(network, name, _as_it_is(stored, placement, placement.device_of(name)))
        return
    changes = may_change and quantised.convert is not None
    device = placement.quantise_on if changes else placement.device_of(name)
    for each, weight in stored.items():
        value = weight.to(device).dequantise(placement.dtype, copy=not changes or each != "weight")
        setattr(module, each, nn.Parameter(value, requires_grad=False))
    if changes and quantised.convert is not None:
        layer = quantised.convert(module, device)  # type: ignore[arg-type]
        if quantised.made is not None:
            quantised.made[name] = layer.quantised
        _replace(network, name, _moved(layer, name, placement))


def _known(module: nn.Module, name: str, read: Read, placement: Placement, weight: QuantisedWeight) -> nn.Module:
    """The layer with a cached weight. Only its bias is read from the model file."""
    bias = None
    if isinstance(module.bias, Tensor):
        bias = read(f"{name}.bias").to(placement.quantise_on).dequantise(placement.dtype)
    return FrozenLinear(weight, bias)


def _moved(layer: nn.Module, name: str, placement: Placement) -> nn.Module:
    """The quantised layer on its device. One for host memory stays where it is until its block is complete, and is then
    copied once, to its final place."""
    return layer if placement.is_on_host(name) else layer.to(placement.device)


def _as_it_is(stored: dict[str, StoredWeight], placement: Placement, device: torch.device) -> FrozenLinear:
    weight = stored["weight"].to(device)
    scale = torch.ones((), device=device) if weight.scale is None else weight.scale
    own = QuantisedWeight(EightBits(weight.rotation), {"codes": _owned(weight.codes), "scale": scale})
    bias = stored["bias"].to(device).dequantise(placement.dtype) if "bias" in stored else None
    return FrozenLinear(own, bias)


def _owned(codes: Tensor) -> Tensor:
    """Codes that are independent of the file: on the CPU they still share its memory map, so they are copied."""
    return codes.clone() if codes.device.type == "cpu" else codes


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
