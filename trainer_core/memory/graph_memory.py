"""The memory of CUDA graphs that were captured while torch allocates with cudaMallocAsync.

torch's own allocator gives the tensors of a capture memory that stays theirs. With cudaMallocAsync, each allocation and
each free is recorded as a node of the graph instead. Launching the graph then allocates and frees, in memory that the
driver keeps for the graphs of a device and that torch neither counts nor gives back. So this module asks the driver,
through its C interface. What the driver promises: "Graph Memory Nodes" in NVIDIA's CUDA C++ Programming Guide.
"""

from __future__ import annotations

import ctypes
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from functools import lru_cache
from typing import NamedTuple

import torch

# From cuda.h: CUresult, CUgraphMem_attribute, CUgraphNodeType, and where CUDA_MEM_ALLOC_NODE_PARAMS has what we read.
_OUT_OF_MEMORY = 2
_RESERVED_NOW = 2
_ALLOCATES, _FREES = 10, 11
_PARAMS_BYTES, _SIZE_AT, _ADDRESS_AT = 256, 104, 112
_CHUNK = 2**25  # bytes that the driver takes at once for graphs, as seen on an H200


def uses_graph_memory() -> bool:
    """Whether graphs get their memory from the driver, because torch allocates with cudaMallocAsync."""
    return torch.cuda.get_allocator_backend() == "cudaMallocAsync"


def reserved_bytes(device: torch.device) -> int:
    """Bytes that the driver keeps for graphs on the device.

    Raises:
        RuntimeError: the driver does not tell.
    """
    value = ctypes.c_uint64()
    _call("cuDeviceGetGraphMemAttribute", _number(device), _RESERVED_NOW, ctypes.byref(value))
    return value.value


def trim(device: torch.device) -> None:
    """Give back what the driver keeps for graphs that have freed all that they allocated. Graphs that run again get new
    memory. Waits for the device.

    Raises:
        RuntimeError: the driver refuses.
    """
    torch.cuda.synchronize(device)
    _call("cuDeviceGraphMemTrim", _number(device))


class Allocations(NamedTuple):
    """What a graph leaves allocated, also of what it found, by address; and the memory in bytes that it needs."""

    unfreed: tuple[int, ...] = ()
    needed_bytes: int = 0


def allocations(stream: torch.cuda.Stream, earlier: Iterable[int] = ()) -> Allocations:
    """What the stream's capture has allocated so far. `earlier`: what a graph before it leaves allocated.

    Raises:
        RuntimeError: nothing is being captured.
    """
    status, number, graph = ctypes.c_int(), ctypes.c_uint64(), ctypes.c_void_p()
    found = ctypes.byref(status), ctypes.byref(number), ctypes.byref(graph), None, None
    _call("cuStreamGetCaptureInfo_v2", ctypes.c_void_p(stream.cuda_stream), *found)
    count = ctypes.c_size_t()
    _call("cuGraphGetNodes", graph, None, ctypes.byref(count))
    nodes = (ctypes.c_void_p * count.value)()
    _call("cuGraphGetNodes", graph, nodes, ctypes.byref(count))
    balance = Counter(earlier)  # by address. A graph may allocate one again, and nodes come in any order
    sizes: dict[int, int] = {}
    kind, params, freed = ctypes.c_int(), ctypes.create_string_buffer(_PARAMS_BYTES), ctypes.c_uint64()
    for each in nodes:
        node = ctypes.c_void_p(each)
        _call("cuGraphNodeGetType", node, ctypes.byref(kind))
        if kind.value == _ALLOCATES:
            _call("cuGraphMemAllocNodeGetParams", node, params)
            size, address = (ctypes.c_uint64.from_buffer(params, offset).value for offset in (_SIZE_AT, _ADDRESS_AT))
            balance[address] += 1
            sizes[address] = max(size, sizes.get(address, 0))
        elif kind.value == _FREES:
            _call("cuGraphMemFreeNodeGetParams", node, ctypes.byref(freed))
            balance[freed.value] -= 1
    return Allocations(tuple(address for address, times in balance.items() if times > 0), _needed_bytes(sizes))


def _needed_bytes(sizes: Mapping[int, int]) -> int:
    """Bytes of the chunks that allocations of these sizes, by address, lie in. A graph uses its addresses again, so
    each chunk needs memory once."""
    total = end = 0  # the end of the last chunk that is counted
    for address, size in sorted(sizes.items()):
        first, after = address // _CHUNK * _CHUNK, -(-(address + size) // _CHUNK) * _CHUNK
        total += max(0, after - max(first, end))
        end = max(end, after)
    return total


def raise_if_too_large(needed_bytes: int, device: torch.device) -> None:
    """Compare what graphs need with what the device has, before the driver tries to get it. An attempt that failed left
    hundreds of MiB with the driver that could not be given back (on an H200).

    Raises:
        OutOfMemoryError: it does not suffice.
    """
    free = torch.cuda.mem_get_info(device)[0] + reserved_bytes(device)  # graphs that don't run now share theirs
    if needed_bytes > free:
        gib = needed_bytes / 2**30, free / 2**30
        raise torch.OutOfMemoryError("CUDA graphs need {:.1f} GiB of memory, and {:.1f} GiB are free.".format(*gib))


def free_at(addresses: Iterable[int], stream: torch.cuda.Stream) -> None:
    """Free what a graph's last launch has allocated, after the work that is enqueued on the stream. Skips what has been
    freed since."""
    for address in addresses:
        with suppress(RuntimeError):
            _call("cuMemFreeAsync", ctypes.c_uint64(address), ctypes.c_void_p(stream.cuda_stream))


def take_memory(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
    """Let the driver get the memory now that the graph's launches on the stream need. With a version of torch that does
    not tell the graph's handle, the first launch gets it.

    Raises:
        OutOfMemoryError: the device's memory does not suffice.
    """
    if hasattr(graph, "raw_cuda_graph_exec"):
        handle = ctypes.c_void_p(graph.raw_cuda_graph_exec())
        _call("cuGraphUpload", handle, ctypes.c_void_p(stream.cuda_stream))


def _call(name: str, *arguments: object) -> None:
    code = getattr(_driver(), name)(*arguments)
    if code == _OUT_OF_MEMORY:
        raise torch.OutOfMemoryError(f"CUDA out of memory. The driver's {name} needs more.")
    if code:
        raise RuntimeError(f"The CUDA driver's {name} failed with error {code}.")


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")


def _number(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index
