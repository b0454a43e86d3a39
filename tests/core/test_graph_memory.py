"""What is asked of the CUDA driver about the memory of graphs. The driver is replaced."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer_core.memory import graph_memory

ALLOCATES, FREES, KERNEL = 10, 11, 0  # CUgraphNodeType in cuda.h
FUNCTIONS = {
    "cuStreamGetCaptureInfo_v2": "capture_info",
    "cuGraphGetNodes": "get_nodes",
    "cuGraphNodeGetType": "node_type",
    "cuGraphMemAllocNodeGetParams": "allocation",
    "cuGraphMemFreeNodeGetParams": "free_node",
    "cuMemFreeAsync": "free",
    "cuDeviceGetGraphMemAttribute": "attribute",
}
CHUNK = 32 * 2**20
SIZES = {CHUNK: CHUNK, 2 * CHUNK: 1, 2 * CHUNK + 512: CHUNK}  # bytes by address
Nodes = list[tuple[int, int]]  # kind and address


def put(pointer: Any, value: int) -> None:
    pointer._obj.value = value


class FakeDriver:
    """A capture with these nodes, and a device whose graphs hold memory."""

    def __init__(self, nodes: Nodes, *, error: int = 0) -> None:
        self.nodes, self.error, self.freed = nodes, error, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self, FUNCTIONS[name])

    def capture_info(self, stream: Any, status: Any, number: Any, graph: Any, *_: None) -> int:
        put(status, 1), put(graph, 7)
        return self.error

    def get_nodes(self, graph: Any, nodes: Any, count: Any) -> int:
        if nodes is not None:
            nodes[:] = range(1, len(self.nodes) + 1)
        put(count, len(self.nodes))
        return 0

    def node_type(self, node: Any, kind: Any) -> int:
        put(kind, self.nodes[node.value - 1][0])
        return 0

    def allocation(self, node: Any, params: Any) -> int:
        address = self.nodes[node.value - 1][1]
        ctypes.c_uint64.from_buffer(params, 104).value = SIZES.get(address, 1)
        ctypes.c_uint64.from_buffer(params, 112).value = address
        return 0

    def free_node(self, node: Any, address: Any) -> int:
        put(address, self.nodes[node.value - 1][1])
        return 0

    def free(self, address: Any, stream: Any) -> int:
        self.freed.append(address.value)
        return 0

    def attribute(self, device: int, which: int, value: Any) -> int:
        put(value, 100 * device + which)
        return 0


def use(monkeypatch: pytest.MonkeyPatch, driver: FakeDriver) -> Any:
    """The stream of a capture."""
    monkeypatch.setattr(graph_memory, "_driver", lambda: driver)
    return SimpleNamespace(cuda_stream=5)


FORWARD = [(ALLOCATES, 0x20), (KERNEL, 0), (ALLOCATES, 0x10), (FREES, 0x20), (ALLOCATES, 0x30)]


@pytest.mark.parametrize(
    ("nodes", "earlier", "left"),
    [
        (FORWARD, (), {0x10, 0x30}),
        ([*FORWARD, (ALLOCATES, 0x20)], (), {0x10, 0x20, 0x30}),  # an address that is used again
        ([(FREES, 0x20), *FORWARD, (ALLOCATES, 0x20)], (), {0x10, 0x30}),  # nodes come in any order
        ([(FREES, 0x10), (ALLOCATES, 0x40), (FREES, 0x40)], (0x10, 0x30), {0x30}),
        ([(FREES, 0x10), (FREES, 0x30)], (0x10, 0x30), set()),
    ],
)
def test_what_a_capture_leaves_allocated(
    nodes: Nodes, earlier: tuple[int, ...], left: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = use(monkeypatch, FakeDriver(nodes))
    assert set(graph_memory.allocations(stream, earlier).unfreed) == left


def test_memory_that_a_graph_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the four chunks, one is used twice, one is shared by two allocations, and one is only touched."""
    nodes = [
        (ALLOCATES, CHUNK),
        (FREES, CHUNK),
        *((ALLOCATES, address) for address in reversed(SIZES)),
        (ALLOCATES, 512),
    ]
    assert graph_memory.allocations(use(monkeypatch, FakeDriver(nodes))).needed_bytes == 4 * CHUNK


@pytest.mark.parametrize(("needed", "fits"), [(1302, True), (1303, False)])
def test_graphs_must_fit_beside_what_others_use(needed: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free is what the device has free, and what the driver keeps for graphs."""
    use(monkeypatch, FakeDriver([]))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1000, 5000))
    with nullcontext() if fits else pytest.raises(torch.OutOfMemoryError, match="GiB are free"):
        graph_memory.raise_if_too_large(needed, torch.device("cuda", 3))


def test_an_error_of_the_driver_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = use(monkeypatch, FakeDriver([], error=901))
    with pytest.raises(RuntimeError, match="cuStreamGetCaptureInfo_v2 failed with error 901"):
        graph_memory.allocations(stream)


def test_memory_of_the_device_is_asked_for_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = FakeDriver([])
    stream = use(monkeypatch, driver)
    assert graph_memory.reserved_bytes(torch.device("cuda", 3)) == 302
    graph_memory.free_at([0x10, 0x30], stream)
    assert driver.freed == [0x10, 0x30]
