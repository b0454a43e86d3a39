"""Lets an observer stop a network between its layers."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from ..events import Observer, raise_if_stopped


def stop_before_each(layers: Iterable[nn.Module], observer: Observer) -> None:
    """Make each layer ask the observer before it runs, for as long as the network lives.

    On the CPU a picture or a long prompt can take minutes, so asking once per forward pass would be too seldom. The
    layers then raise `Interrupted`.
    """
    for layer in layers:
        layer.register_forward_pre_hook(lambda _layer, _inputs: raise_if_stopped(observer))
