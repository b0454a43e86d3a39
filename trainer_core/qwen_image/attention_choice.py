"""Which kernels compute attention: the fastest ones that run on the card and compute it right.

Which one is fastest depends on the card and the number of tokens: on an H200 cuDNN's takes 0.6 of the time of torch's
flash kernel, on other cards torch may not offer it, and other packages have more. So they are timed once for each size,
the forward pass apart from the backward pass. Two that are equally fast may change places in the next timing, and their
last bits differ, so a run keeps its choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..device import seconds_on_device
from ..rng import stream
from ..text import reason_of
from .attention_kernels import CPU, CUDA, Kernel, no_pass
from .attention_packages import installed_kernels

_LOG = logging.getLogger(__name__)
_FASTER = 0.95  # a later kernel is taken if it needs at most this fraction of the time of the ones before it
# Largest relative errors in a test with random numbers, where torch's CPU kernel in bfloat16 has 0.005, scores that are
# a tenth too large give 0.14, and a binary logarithm gives 0.44.
_EXACT_ERROR, _8_BIT_ERROR = 0.02, 0.1
_QUERIES, _KEYS = 200, 300  # tokens in this test: not the same number, and no multiple of a kernel's tiles


class Place(NamedTuple):
    """What a choice holds for. `queries` and `keys` are powers of two, the most tokens. `in_8_bits`: kernels that round
    to 8 bits are allowed."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    width: int
    queries: int
    keys: int
    in_8_bits: bool

    @property
    def name(self) -> str:
        """In run.json. The other values are those of the run."""
        return f"{self.queries}x{self.keys}{' 8bit' if self.in_8_bits else ''}"


class _Choices:
    """The kernels in use. `names` are the choices of the run's earlier starts, and `keep` stores them."""

    def __init__(self, names: Mapping[str, str], keep: Callable[[dict[str, str]], None]) -> None:
        self.names, self.keep = dict(names), keep
        self.kernels: dict[Place, Kernel | None] = {}
        self.untimed: dict[Place, Kernel] = {}  # while memory didn't suffice to time them


_of_process: dict[Place, Kernel] = {}  # what was timed
_in_use = [_Choices({}, lambda _: None)]


@contextmanager
def kept_choices(names: object, keep: Callable[[dict[str, str]], None]) -> Iterator[None]:
    """A context in which attention uses the kernels that a run has chosen before, if they still run here.

    `names` are these choices; anything but names by size counts as none. `keep` gets all choices after each new one.
    """
    known = names if isinstance(names, dict) else {}
    known = {size: kernel for size, kernel in known.items() if isinstance(kernel, str)}
    mine = _Choices(known, keep)
    _in_use.append(mine)
    try:
        yield
    finally:
        _in_use.remove(mine)


def kernel_for(query: Tensor, key: Tensor, *, in_8_bits: bool = False) -> Kernel | None:
    """The kernel for these queries [1, M, H, d] and keys [1, N, H, d]; None if there is none for the device.

    `in_8_bits`: its forward pass may round to 8 bits.
    """
    if query.device.type == "cpu":
        return CPU
    if query.device.type == "meta":  # steps whose bytes are counted without a device
        return CUDA[0]
    if query.device.type != "cuda" or torch.version.hip:
        return None
    return _on_card(query, key, in_8_bits=in_8_bits)


def _on_card(query: Tensor, key: Tensor, *, in_8_bits: bool) -> Kernel | None:
    queries, keys = (1 << math.ceil(math.log2(max(each.shape[1], 1))) for each in (query, key))
    place = Place(query.device, query.dtype, query.shape[2], query.shape[3], queries, keys, in_8_bits)
    choices = _in_use[-1]
    if place not in choices.kernels:
        if torch.cuda.is_current_stream_capturing():  # nothing can be tested or timed now
            return choices.untimed.get(place, CUDA[0])
        forwards, backwards = _usable(place)
        if not forwards or not backwards:
            choices.kernels[place] = None
            return None
        try:
            choices.kernels[place] = _chosen(choices, place, forwards, backwards, (query.detach(), key.detach()))
        except torch.OutOfMemoryError:  # a pass doesn't fit now, for example in a preview
            choices.untimed[place] = _joined(forwards[0], backwards[0])
            return choices.untimed[place]
    return choices.kernels[place]


def _usable(place: Place) -> tuple[list[Kernel], list[Kernel]]:
    """The kernels with a forward pass that runs and is right, and those with such a backward pass. torch's own are
    first, because they are the usual choice."""
    others = installed_kernels(in_8_bits=False), installed_kernels(in_8_bits=True) if place.in_8_bits else ()
    tested = [_tested(each, place.device, place.dtype, place.width) for each in (*CUDA, *others[0], *others[1])]
    forwards = [each for each in tested if each.forward is not no_pass]
    return forwards, [each for each in tested if each.backward is not no_pass]


def _chosen(
    choices: _Choices, place: Place, forwards: Sequence[Kernel], backwards: Sequence[Kernel], inputs: Sequence[Tensor]
) -> Kernel:
    """The run's kernel for a place, which is kept with the run if it is new."""
    name = choices.names.get(place.name)
    if name is not None:
        for kernel in (_joined(first, second) for first in forwards for second in backwards):
            if kernel.name == name:
                return kernel
        _LOG.info(
            "This run's attention kernels %s do not run here. Others may change the last bits of its steps.", name
        )
    if place not in _of_process:
        _of_process[place] = _fastest(place, forwards, backwards, *inputs)
    choices.names[place.name] = _of_process[place].name
    choices.keep(dict(choices.names))
    return _of_process[place]


def _joined(forward: Kernel, backward: Kernel) -> Kernel:
    return replace(forward, name=f"{forward.name}/{backward.name}", backward=backward.backward)


@torch.no_grad()
def _fastest(
    place: Place, forwards: Sequence[Kernel], backwards: Sequence[Kernel], query: Tensor, key: Tensor
) -> Kernel:
    """The fastest forward pass with the fastest backward pass of these queries and keys."""
    inputs = query, key, key  # new values would change torch's random state
    forward = _shortest(place.device, forwards, lambda each: each.forward(*inputs))
    out, length = forward.forward(*inputs)
    backward = _shortest(place.device, backwards, lambda each: each.backward(out, *inputs, out, length))
    if {each.name for each in (*forwards, *backwards)} - {each.name for each in CUDA}:
        text = "Attention of up to %d queries and %d keys uses %s forward and %s backward."
        _LOG.info(text, place.queries, place.keys, forward.name, backward.name)
    return _joined(forward, backward)


def _shortest(device: torch.device, kernels: Sequence[Kernel], call: Callable[[Kernel], object]) -> Kernel:
    """The kernel whose call takes the shortest time."""
    best, shortest = kernels[0], math.inf
    for kernel in kernels if len(kernels) > 1 else ():
        try:
            seconds = seconds_on_device(device, lambda kernel=kernel: call(kernel))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # noqa: BLE001 - a package may raise anything
            _LOG.info("%s is not used for attention (%s: %s).", kernel.name, type(error).__name__, reason_of(error))
            continue
        if seconds < _FASTER * shortest:
            best, shortest = kernel, seconds
    return best


@cache
def _tested(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> Kernel:
    """The kernel without a pass that doesn't run on the device, or whose results are wrong.

    Logs such a pass, unless it is one of torch's that the device or the dtype doesn't have.
    """
    gradient, *inputs = _random_tensors(device, dtype, width)
    out, length, *gradients = _by_definition(gradient, *inputs)
    faults = {
        "forward": _fault(kernel, kernel.forward, inputs, (out, length)),
        "backward": _fault(kernel, kernel.backward, (gradient, *inputs, out, length), gradients),
    }
    for name, fault in faults.items():
        if fault:
            text = "The %s pass of %s is not used for attention in %s with heads of %d: %s."
            _LOG.info(text, name, kernel.name, str(dtype).removeprefix("torch."), width, fault)
    return replace(kernel, **{name: no_pass for name, fault in faults.items() if fault is not None})


def _fault(
    kernel: Kernel, call: Callable[..., Sequence[Tensor]], given: Sequence[Tensor], wanted: Sequence[Tensor]
) -> str | None:
    """What is wrong with one of the kernel's passes: "" if torch doesn't have it here, None if nothing is wrong."""
    if call is no_pass:
        return None
    mine = [each.clone() for each in given]
    try:
        errors = [_relative_error(*each) for each in zip(call(*mine), wanted, strict=True)]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        if "out of memory" in str(error) or "ALLOC_FAILED" in str(error):  # of CUDA's libraries
            raise torch.OutOfMemoryError(str(error)) from error
        return "" if kernel in CUDA else f"it fails ({type(error).__name__}: {reason_of(error)})"
    bound = _EXACT_ERROR if kernel.is_exact else _8_BIT_ERROR
    if not all(each <= bound for each in errors):  # NaN is wrong, too
        return f"its results are wrong (relative errors {', '.join(f'{each:.3f}' for each in errors)})"
    return None if all(map(torch.equal, mine, given)) else "it changes its inputs"


def _random_tensors(device: torch.device, dtype: torch.dtype, width: int) -> list[Tensor]:
    """A gradient, queries, keys and values of two heads. Keys have a mean, as those of the network do."""
    draws, tensors = stream(0, "attention test"), []
    for tokens in (_QUERIES, _QUERIES, _KEYS, _KEYS):
        tensors.append(torch.randn(1, tokens, 2, width, generator=draws))
    tensors[2] += 2 * torch.randn(1, 1, 2, width, generator=draws)
    return [each.to(device, dtype) for each in tensors]


@torch.no_grad()
def _by_definition(*tensors: Tensor) -> list[Tensor]:
    """Output, log-sum-exp and gradients for a gradient, queries, keys and values; see Kernel."""
    gradient, query, key, value = (each.float().transpose(1, 2) for each in tensors)
    scale = query.shape[-1] ** -0.5
    scores = scale * query @ key.mT
    shares = scores.softmax(-1)
    of_shares = gradient @ value.mT
    of_scores = scale * shares * (of_shares - (of_shares * shares).sum(-1, keepdim=True))
    found = shares @ value, of_scores @ key, of_scores.mT @ query, shares.mT @ gradient
    out, *gradients = (each.transpose(1, 2).to(tensors[0].dtype) for each in found)
    return [out.contiguous(), scores.logsumexp(-1), *gradients]


def _relative_error(found: Tensor, wanted: Tensor) -> float:
    if found.shape != wanted.shape:
        return math.inf
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())
