"""Counts the device memory of a training step on torch's meta device, without a GPU.

Sums the tensors that are alive after each operation. Attention is counted as FlashAttention.
"""

from __future__ import annotations

import gc
import traceback
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.support.full_size_step import Setting, our_step
from trainer_core.memory.offload import HostCopies
from trainer_core.precision import eight_bit
from trainer_core.precision.eight_bit import Coded
from trainer_core.precision.formats import QuantisedWeight

META = torch.device("meta")

_ALLOCATED_IN = 512  # bytes: CUDA's allocator rounds up to a multiple of this

_STEPS = 2  # the optimizer's state exists from the second step on


class LiveBytes(TorchDispatchMode):
    """Bytes of live tensors on the meta device, `now` and at the `peak`; `at_peak` lists them by origin, if `names`."""

    def __init__(self, *, names: bool = False) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: Counter[str] = Counter()
        self._names, self._paused = names, False
        self._alive: dict[int, tuple[int, str]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and args[0].device != META and args[1].device == META:
            return args[0]  # meta tensors have no data to copy
        if (
            func is torch.ops.aten._to_copy.default
            and args[0].device == META
            and torch.device(kwargs.get("device") or META).type == "cpu"
        ):
            with self.paused():  # stands for a tensor in host memory, which has no data to hold
                return torch.empty_like(args[0])
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device == META and not self._paused:
                self._count(tensor, func)
        return result

    def restart(self) -> None:
        """Start a new search for the peak."""
        self.peak = self.now

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context manager: tensors made inside are not counted."""
        self._paused, before = True, self._paused
        yield
        self._paused = before

    def _count(self, tensor: Tensor, func: Any) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        num_bytes = -(-storage.nbytes() // _ALLOCATED_IN) * _ALLOCATED_IN
        self._alive[key] = num_bytes, self._name(tensor, func)
        weakref.finalize(storage, self._gone, key)
        self.now += num_bytes
        if self.now > self.peak:
            self.peak = self.now
            if self._names:
                self.at_peak = Counter()
                for alive, name in self._alive.values():
                    self.at_peak[name] += alive

    def _gone(self, key: int) -> None:
        self.now -= self._alive.pop(key)[0]

    def _name(self, tensor: Tensor, func: Any) -> str:
        if not self._names:
            return ""
        frames = [frame for frame in traceback.extract_stack() if "/torch/" not in frame.filename][-5:-2]
        where = " < ".join(f"{Path(frame.filename).stem}:{frame.lineno}" for frame in reversed(frames))
        return f"{func} {tuple(tensor.shape)} {tensor.dtype} {where}"


def traced_step(setting: Setting, layers: int, *, names: bool = False) -> LiveBytes:
    """Count the memory of a training step with these settings, once the optimizer's state exists."""
    live = LiveBytes(names=names)
    keep = HostCopies.keep

    def keep_uncounted(copies: HostCopies, tensor: Tensor) -> Any:
        with live.paused():  # the copy is in host memory; temporary meta tensors must not count
            return keep(copies, tensor)

    # bitsandbytes keeps tables by device, and would keep those that are made here for real tensors.
    tables = mock.patch.dict("bitsandbytes.functional.name2qmap") if setting.precision == "nf4-bnb" else nullcontext()
    with (
        tables,
        flash_attention(),
        fused_dropout(),
        products_of_a_card(),
        mock.patch("torch.autocast", return_value=nullcontext()),  # which has no meta device
        mock.patch.object(HostCopies, "keep", keep_uncounted),
        mock.patch("trainer_core.memory.streaming._packed", _host_memory),
        live,
    ):
        _transformer, step = our_step(setting, layers, META)
        latents, condition = setting.inputs(META)
        gc.collect()  # a streamed block's own weights are in reference cycles
        for _ in range(_STEPS):
            live.restart()
            step(latents, condition)
    return live


def products_of_a_card() -> AbstractContextManager[Any]:
    """Patch 8-bit products to allocate what a card's kernels do: codes, scales, transposed codes and results."""
    as_they_are = eight_bit.coded

    def coded(form: Any, tensors: Sequence[Tensor], dtype: torch.dtype, gradient: Tensor | None = None) -> Coded:
        if eight_bit.is_coded(form, tensors, dtype):
            return as_they_are(form, tensors, dtype)
        layer = QuantisedWeight(form, dict(zip(form.names, tensors, strict=True)))
        rows, columns = layer.shape
        is_transposed = gradient is not None
        codes = torch.empty((columns, rows) if is_transposed else (rows, columns), dtype=dtype, device=META)
        return Coded(codes, torch.empty(rows, device=META), is_transposed=is_transposed)

    def quantised(x: Tensor, dtype: torch.dtype, factors: Tensor | None = None, **_gelu: Any) -> Coded:
        return Coded(torch.empty_like(x, dtype=dtype), torch.empty(len(x), device=x.device))

    def multiplied(
        tokens: Coded, weight: Tensor, scales: Any, bias: Any, dtype: torch.dtype, *, backward: bool, change: Any = None
    ) -> Tensor:
        transposed = torch.empty_like(weight) if backward else None
        result = tokens.codes.new_empty(len(tokens.codes), weight.shape[1 if backward else 0], dtype=dtype)
        del transposed
        return result

    def adds_changes(codes: torch.dtype, x: Tensor) -> bool:
        return codes == torch.int8 and x.dtype.itemsize == 2

    patched = {"coded": coded, "quantised": quantised, "_multiplied": multiplied, "adds_changes": adds_changes}
    return mock.patch.multiple(eight_bit, **patched)


def _host_memory(slots: Any, size: int) -> tuple[Any, Tensor]:
    """Host memory for a streamed block, whose weights stay on the meta device until they are views of a buffer."""
    return slots, torch.empty(size, dtype=torch.uint8)


def flash_attention() -> AbstractContextManager[Any]:
    """Patch torch's attention to FlashAttention, as a GPU runs it: it keeps no tokens x tokens matrix."""
    return mock.patch("torch.nn.functional.scaled_dot_product_attention", _flash_attention)


def fused_dropout() -> AbstractContextManager[Any]:
    """Patch torch's dropout to the kernel of CUDA devices, which keeps a mask of one byte per element."""

    def dropout(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return torch.native_dropout(x, p, training)[0] if training and p > 0 else x

    return mock.patch("torch.nn.functional.dropout", dropout)


def _flash_attention(query: Tensor, key: Tensor, value: Tensor, **_options: Any) -> Tensor:
    """Keeps what FlashAttention keeps for backward: inputs, output and one number per token and head."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[0]
