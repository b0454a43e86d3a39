"""Which micro-batches run as CUDA graphs, and what happens if one can't. What CUDA does is replaced."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.support.fake_graphs import FakePool
from trainer_core.adapters.master_weights import master_weights
from trainer_core.memory.step_graphs import StepGraphs

SIZES = (3, 5, 3, 3, 5, 7, 5)


class Network:
    """Three weights, one of them unused, and a step that accumulates the gradients of several sizes."""

    def __init__(self, pool: FakePool, **options: Any) -> None:
        torch.manual_seed(0)
        parameters = {name: nn.Parameter(torch.randn(4, 4)) for name in ("down", "up", "unused")}
        self.weights = master_weights(parameters, torch.bfloat16)
        self.pool, self.ordinary = pool, 0
        self.graphs = StepGraphs(self.weights.masters.values(), pool, **options)  # type: ignore[arg-type]
        self.optimizer = torch.optim.AdamW(self.weights.masters.values(), weight_decay=0.1)

    def compute(self, x: Tensor, mask: Tensor | None) -> Tensor:
        self.ordinary += 1
        copies = self.weights.copies
        return (x @ copies["down"] @ copies["up"]) * (1 if mask is None else mask)

    def passes(self, size: int, number: int = 0, kind: str = "kind") -> Tensor:
        drawn = torch.randn(size, 4, generator=torch.Generator().manual_seed(number))
        x = drawn.bfloat16().requires_grad_()
        out = self.graphs(kind, self.compute, x, None)
        out.float().square().sum().backward()
        return out.detach()

    def step(self, first: int = 0) -> None:
        for number, size in enumerate(SIZES):
            self.passes(size, first + number)
        self.optimizer.step()
        self.weights.publish()
        self.optimizer.zero_grad(set_to_none=True)

    def trained(self) -> list[Tensor]:
        return [each.detach().clone() for each in self.weights.masters.values()]


def network(pool: FakePool | None = None, *, started: bool = True, **options: Any) -> Network:
    made = Network(pool or FakePool(), **options)
    if started:
        made.graphs.start()
    return made


def test_a_size_is_captured_when_it_comes_again() -> None:
    net = network()
    for number, size in enumerate(SIZES):
        net.passes(size, number)
    assert [each.replays for each in net.pool.captured] == [2, 2]  # of size 3 and of size 5


def test_until_the_start_sizes_are_only_noticed() -> None:
    net = network(started=False)
    net.passes(3), net.passes(3)
    assert not net.pool.captured
    net.graphs.start()
    net.passes(3)
    assert len(net.pool.captured) == 1


def test_passes_without_gradients_are_never_captured() -> None:
    net = network()
    with torch.no_grad():
        for _ in range(3):
            net.graphs("kind", net.compute, torch.ones(3, 4, dtype=torch.bfloat16), None)
    assert not net.pool.captured and net.ordinary == 3


@pytest.mark.parametrize("other", ["kind", "mask", "type"])
def test_only_inputs_of_one_kind_share_a_graph(other: str) -> None:
    net = network()
    net.passes(3), net.passes(3)
    x = torch.ones(3, 4, dtype=torch.float64 if other == "type" else torch.bfloat16, requires_grad=True)
    mask = torch.ones(3, 1, dtype=x.dtype) if other == "mask" else None
    kind, compute = "other" if other == "kind" else "kind", lambda x, _: x * 2
    assert torch.equal(net.graphs(kind, compute, x, mask).detach(), 2 * x.detach())
    assert net.pool.captured[0].replays == 1


def test_later_sizes_get_no_graph_when_there_are_enough() -> None:
    net = network(most=2)
    for _ in range(3):
        for size in (2, 3, 4):
            net.passes(size)
    assert [each.replays for each in net.pool.captured] == [2, 2]
    net.graphs.clear()
    net.passes(4), net.passes(3), net.passes(2)
    assert len(net.pool.captured) == 4  # after the graphs were freed, the next sizes get them


@pytest.mark.parametrize("stops_after", [None, 1])
def test_training_is_bit_equal_with_and_without_graphs(stops_after: int | None) -> None:
    """Ordinary and replayed micro-batches of one step add up. The unused weight stays without a gradient."""
    plain, graphed = network(started=False), network()
    for number in range(4):
        plain.step(10 * number), graphed.step(10 * number)
        if number == stops_after:
            graphed.graphs.stop()
    assert graphed.pool.captured and not plain.pool.captured
    assert all(torch.equal(one, other) for one, other in zip(plain.trained(), graphed.trained(), strict=True))
    assert torch.equal(graphed.trained()[2], network().trained()[2])  # zeros as gradients would have let it decay


def test_gradients_keep_their_addresses() -> None:
    net = network()
    places = []
    for _ in range(2):
        net.passes(3), net.passes(3)
        down = net.weights.masters["down"]
        assert down.grad is not None
        places.append(down.grad.data_ptr())
        net.optimizer.zero_grad(set_to_none=True)
    assert places[0] == places[1]


OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory.")
NOT_ALLOWED = RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OUT_OF_MEMORY, "because graphs need more VRAM than is free."),
        (NOT_ALLOWED, "because a pass can't be captured (RuntimeError: operation not permitted when stream is"),
    ],
)
def test_a_capture_that_fails_leaves_ordinary_steps(
    error: Exception, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    plain, failing = network(started=False), network(FakePool(error))
    for number in range(2):
        plain.step(number), failing.step(number)
    assert all(torch.equal(one, other) for one, other in zip(plain.trained(), failing.trained(), strict=True))
    assert not failing.graphs.is_active and failing.pool.freed == 1
    assert caplog.text.count("Steps run without CUDA graphs from now on") == caplog.text.count(words) == 1
    assert "\nmore" not in caplog.text


def test_a_later_capture_that_fails_keeps_the_graphs_before_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    net = network(FakePool(OUT_OF_MEMORY, at=1))
    for _ in range(3):
        net.passes(3), net.passes(5)
    assert [each.replays for each in net.pool.captured] == [2]
    assert caplog.text.count("CUDA graphs are kept for 1 sizes of pictures and prompts, because graphs need more") == 1


def test_memory_that_an_ordinary_step_lacks_is_taken_from_the_graphs() -> None:
    net, cleaned = network(), []
    net.passes(3), net.passes(3)

    def compute() -> str:
        if net.pool.held_bytes:
            raise OUT_OF_MEMORY
        return "done"

    assert net.graphs.attempt(compute, clean_up=lambda: cleaned.append(1)) == "done"
    assert cleaned == [1] and not net.graphs.is_active


def test_a_step_that_lacks_memory_without_graphs_fails() -> None:
    def fail() -> None:
        raise OUT_OF_MEMORY

    with pytest.raises(torch.OutOfMemoryError):
        network().graphs.attempt(fail, clean_up=lambda: None)
