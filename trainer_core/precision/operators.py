"""Operators: functions that torch's compiler calls without looking into them."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from typing import Any

import torch

_DEFINING = threading.Lock()
_LIBRARIES: dict[str, torch.library.Library] = {}  # by namespace; torch forgets the operators with their library


def namespace_of(module: str) -> str:
    """The namespace of a module's operators. Two copies of the pack in a process have their own."""
    return re.sub(r"\W", "_", module)


def define(
    namespace: str, dispatch_key: str, operators: dict[str, tuple[Callable[..., Any], Callable[..., Any]]]
) -> None:
    """Make operators known to torch, once in a process.

    `operators` has for each signature, such as "double(Tensor x) -> Tensor", what computes it for `dispatch_key`,
    such as CUDA, and what tells the compiler its result: empty tensors of the right shapes.
    """
    with _DEFINING:
        if namespace in _LIBRARIES:
            return
        library = torch.library.Library(namespace, "FRAGMENT")
        for signature, (compute, shapes) in operators.items():
            name = signature.partition("(")[0]
            library.define(signature)
            library.impl(name, compute, dispatch_key)
            torch.library.register_fake(f"{namespace}::{name}", shapes, lib=library)
        _LIBRARIES[namespace] = library


def operator(namespace: str, name: str) -> Any:
    """The operator of that name, after `define`."""
    return getattr(getattr(torch.ops, namespace), name).default
