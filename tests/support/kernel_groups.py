"""Groups the device time of a profiled step by what the kernels do. Reads the trace that torch's profiler exports."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

ATTENTION_FORWARD, ATTENTION_BACKWARD = "attention, forward", "attention, backward"
PRODUCTS, PRODUCTS_8BIT, PRODUCTS_THIN = "products, 16 and 32 bit", "products, 8 bit", "products of the adapter"
CODES = "quantise, dequantise, transpose codes"
ELEMENTWISE = "norm, modulation, rotary, activation, other elementwise"
OPTIMIZER, COPIES = "optimizer, clipping", "copies and filling on the device"
TRANSFERS = "copies between host and device"
GROUPS = (
    ATTENTION_FORWARD,
    ATTENTION_BACKWARD,
    PRODUCTS,
    PRODUCTS_8BIT,
    PRODUCTS_THIN,
    CODES,
    ELEMENTWISE,
    OPTIMIZER,
    COPIES,
    TRANSFERS,
)

_GENERATED = re.compile(r"^triton_(poi|red|per|for|mix|unk)_")  # the compiler names these after all that they fuse
_ATTENTION = re.compile(r"sdpa|attention|attn|fmha|flash|dot_do_o|convert_dq|softmax", re.IGNORECASE)
_BACKWARD = re.compile(r"bwd|bprop|backward|cutlassB|dot_do_o|convert_dq")
_PRODUCT = re.compile(r"gemm|gemv|nvjet|matmul|mm\b|xmma|cutlass|cublas|splitk|product|^triton_tem_", re.IGNORECASE)
_EIGHT_BITS = re.compile(r"int8|i8i8|_s8|imma|e4m3|e5m2|fp8|8bit|eight_bit|scaled_mm|int_mm|qqtst", re.IGNORECASE)
_OPTIMIZER = re.compile(r"multi_tensor|adam|foreach|lpnorm", re.IGNORECASE)
_CODES = re.compile(r"quanti|transposed|unpack", re.IGNORECASE)
_COPIES = re.compile(r"aten::(copy_|cat|clone|fill_|zero_)$|^CatArray|direct_copy|FillFunctor|^Mem(cpy|set)")
_CODE_TYPES = ("signed char", "unsigned char", "c10::Float8_e4m3fn", "c10::Float8_e5m2")
_TO_OR_FROM_HOST = re.compile(r"HtoD|DtoH")


class Work(NamedTuple):
    """A kernel, or on the CPU an operation without the ones that it calls. Times in microseconds.

    `operation` launched it, with inputs of these `shapes` and `types`; "" if unknown, as in a CUDA graph.
    """

    name: str
    operation: str
    shapes: tuple[tuple[int, ...], ...]
    types: tuple[str, ...]
    start: float
    end: float
    busy: float


def profiled(step: Callable[[], object], device: torch.device) -> list[Work]:
    """The kernels of `step`, which must wait for the device; on the CPU, its operations."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with profile(activities=activities, record_shapes=True) as found:
        step()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        return work_in(json.loads(path.read_text(errors="replace"))["traceEvents"])


def work_in(events: Sequence[Mapping[str, Any]]) -> list[Work]:
    """The kernels and copies in a trace's events; the operations of the CPU if there are none."""
    operations = [event for event in events if event.get("cat") == "cpu_op"]
    launchers = {event["args"].get("External id"): event for event in operations}
    on_device = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    if on_device:
        return [_work(event, launchers.get(event["args"].get("External id")), event["dur"]) for event in on_device]
    return [_work(event, event, busy) for event, busy in _without_called(operations)]


def _work(event: Mapping[str, Any], launcher: Mapping[str, Any] | None, busy: float) -> Work:
    inputs: Mapping[str, Any] = launcher["args"] if launcher else {}
    shapes = tuple(tuple(shape) for shape in inputs.get("Input Dims", ()) if all(isinstance(n, int) for n in shape))
    return Work(
        event["name"],
        launcher["name"] if launcher else "",
        shapes,
        tuple(inputs.get("Input type", ())),
        event["ts"],
        event["ts"] + event["dur"],
        busy,
    )


def _without_called(operations: Iterable[Mapping[str, Any]]) -> list[tuple[Mapping[str, Any], float]]:
    """Each operation and its time in microseconds without that of the operations which it calls."""
    found: list[tuple[Mapping[str, Any], float]] = []
    callers: dict[Any, list[int]] = {}  # by thread: positions in `found` of the operations that have not ended
    for event in sorted(operations, key=lambda each: (each["ts"], -each["dur"])):
        running = callers.setdefault(event["tid"], [])
        while running and found[running[-1]][0]["ts"] + found[running[-1]][0]["dur"] <= event["ts"]:
            running.pop()
        if running:
            caller, busy = found[running[-1]]
            found[running[-1]] = caller, busy - event["dur"]
        running.append(len(found))
        found.append((event, event["dur"]))
    return found


def group_of(work: Work, rank: int) -> str:
    """The group of a kernel, by its name, the operation that launched it and the sizes and types of its inputs.

    A product is the adapter's if a side of an input is its rank, or twice or three times that (q, k, v in one).
    """
    generated = bool(_GENERATED.match(work.name))
    both = f"{work.name} {work.operation}" if work.operation.startswith("aten::") else work.name
    if work.name.startswith("Mem") and _TO_OR_FROM_HOST.search(work.name):
        return TRANSFERS
    if not generated and _ATTENTION.search(both):
        return ATTENTION_BACKWARD if _BACKWARD.search(both) else ATTENTION_FORWARD
    has_codes = any(kind in _CODE_TYPES for kind in work.types)
    if not generated and _PRODUCT.search(both) and not _CODES.search(work.name):
        if has_codes or _EIGHT_BITS.search(both):
            return PRODUCTS_8BIT
        thin = any(side in (rank, 2 * rank, 3 * rank) for shape in work.shapes for side in shape)
        return PRODUCTS_THIN if thin else PRODUCTS
    if _OPTIMIZER.search(both):
        return OPTIMIZER
    if has_codes or _CODES.search(both):
        return CODES
    return COPIES if _COPIES.search(work.name) or _COPIES.search(work.operation) else ELEMENTWISE


def busy_time(work: Iterable[Work]) -> float:
    """Microseconds in which at least one of these kernels runs. Copies may run beside products."""
    total, until = 0.0, float("-inf")
    for each in sorted(work, key=lambda each: each.start):
        total += max(0.0, each.end - max(each.start, until))
        until = max(until, each.end)
    return total
