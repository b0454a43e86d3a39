"""A network on the meta device gets its weights: block by block from the file, through its precision, to its place."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..config import BaseModelPrecision
from ..errors import ModelFileError
from ..events import Observer, raise_if_stopped
from ..weights.source import Read, WeightSource
from ..weights.stored import StoredWeight
from .frozen_linear import FrozenLinear
from .quantise import Convert, converter, is_kept

_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """How weights end: `dtype` of those that are not quantised, `keep` patterns of layers that never are.

    `quantise_on` is the device that computes the quantised codes; they then go to `device`, or to host memory in
    modules whose names begin with one of `on_host`.
    """

    precision: BaseModelPrecision
    dtype: torch.dtype
    device: torch.device
    quantise_on: torch.device
    keep: tuple[str, ...] = ()
    on_host: tuple[str, ...] = ()

    def device_of(self, name: str) -> torch.device:
        """Where a module's weights end."""
        return torch.device("cpu") if name.startswith(self.on_host) else self.device


def materialise(
    network: nn.Module, source: WeightSource, placement: Placement, phase: str, observer: Observer
) -> nn.Module:
    """Give every parameter of `network`, which lies on the meta device, its value. Frozen, in evaluation mode.

    At most one block is held unquantised at a time, and the file is opened anew for each, so that neither weights nor
    memory maps pile up.

    Raises:
        ModelFileError: a weight is missing, or has another shape.
        MissingPackageError: the precision's package is not installed.
        Interrupted: the observer wants to stop.
    """
    check_shapes(network, source)
    network.eval()  # before: bitsandbytes' layers, if told so, repack their weights on some processors
    convert = converter(placement.precision)
    groups = _groups(network)
    observer.on_progress(phase, 0, len(groups))
    for done, names in enumerate(groups):
        raise_if_stopped(observer)
        with source.opened() as read:
            for name in names:
                _fill(network, name, read, placement, convert)
        observer.on_progress(phase, done + 1, len(groups))
    return network.requires_grad_(False)  # noqa: FBT003


def check_shapes(network: nn.Module, source: WeightSource) -> None:
    """Compare names and shapes, before anything is read.

    Raises:
        ModelFileError: with the first few that don't fit.
    """
    wanted = {name: tuple(parameter.shape) for name, parameter in network.named_parameters()}
    missing = [name for name in wanted if name not in source.shapes]
    if missing:
        raise ModelFileError(
            f"{source.place.name} lacks {len(missing)} of {len(wanted)} weights, among them "
            f"{', '.join(missing[:_SHOWN])}. It is not whole, or not the model it should be: get it again."
        )
    other = [name for name, shape in wanted.items() if source.shapes[name] != shape]
    if other:
        name = other[0]
        raise ModelFileError(
            f"{source.place.name} holds {len(other)} weights of another shape, among them {name} with "
            f"{list(source.shapes[name])} in the place of {list(wanted[name])}. It is another model."
        )


def _groups(network: nn.Module) -> list[list[str]]:
    """Names of modules with parameters of their own, those of a block together."""
    groups: dict[str, list[str]] = {}
    for name, module in network.named_modules():
        if next(module.parameters(recurse=False), None) is not None:
            parts = name.split(".")
            number = next((index for index, part in enumerate(parts) if part.isdigit()), -1)
            groups.setdefault(".".join(parts[: number + 1]), []).append(name)
    return list(groups.values())


def _fill(network: nn.Module, name: str, read: Read, placement: Placement, convert: Convert | None) -> None:
    module = network.get_submodule(name)
    stored = {each: read(f"{name}.{each}" if name else each) for each, _ in module.named_parameters(recurse=False)}
    may_change = type(module) is nn.Linear and not is_kept(name, placement.keep)
    if may_change and placement.precision == "file" and stored["weight"].is_quantised:
        _replace(network, name, _as_it_is(stored, placement, placement.device_of(name)))
        return
    changes = may_change and convert is not None
    device = placement.quantise_on if changes else placement.device_of(name)
    for each, weight in stored.items():
        value = weight.to(device).dequantise(placement.dtype, copy=not changes or each != "weight")
        setattr(module, each, nn.Parameter(value, requires_grad=False))
    if changes and convert is not None:
        _replace(network, name, convert(module, device).to(placement.device_of(name)))  # type: ignore[arg-type]


def _as_it_is(stored: dict[str, StoredWeight], placement: Placement, device: torch.device) -> FrozenLinear:
    weight = stored["weight"].to(device)
    own = StoredWeight(_owned(weight.codes), weight.scale, weight.rotation)
    bias = stored["bias"].to(device).dequantise(placement.dtype) if "bias" in stored else None
    return FrozenLinear(own, bias)


def _owned(codes: Tensor) -> Tensor:
    """A copy, if the codes still lie in the file's memory map."""
    return codes.clone() if codes.device.type == "cpu" else codes


def _replace(network: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    setattr(network.get_submodule(parent), last, module)
