"""Launches of Triton kernels with stand-ins for Triton's own objects. `tests/gpu` launches on a card."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from trainer_core.precision import launch
from trainer_core.precision.launch import cdiv, power_of_2

GRID = 3, 2, 1


class FakeKernel:
    """A kernel with the parameters x, count and BLOCK. Keeps how it was compiled, and how its code was launched."""

    arg_names = ("x", "count", "BLOCK")

    def __init__(self) -> None:
        self.arg_names = list(type(self).arg_names)
        self.compiled: list[dict[str, Any]] = []
        self.launched: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def found_by_triton(*arguments: Any, **others: Any) -> Any:
            number = len(self.compiled)
            self.compiled.append(others)

            class Compiled:
                def __getitem__(_, again: tuple[int, ...]) -> Any:  # noqa: N805
                    return lambda *every: self.launched.append((number, again, *every))

            return Compiled()

        assert grid == GRID
        return found_by_triton

    def __call__(self, x: torch.Tensor, count: int, block: int = 4, **options: Any) -> int:
        """Launch, and return the number of times that Triton was asked."""
        launch._on_current_device(self, GRID, (x, count), {"BLOCK": block}, options)
        return len(self.compiled)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> FakeKernel:
    monkeypatch.setattr(launch, "_COMPILED", {})
    return FakeKernel()


def test_triton_is_asked_once(kernel: FakeKernel) -> None:
    x, y = torch.zeros(2, 16)
    assert kernel(x, 3, num_warps=4) == kernel(y, 5, num_warps=4) == 1
    assert kernel.compiled == [{"BLOCK": 4, "num_warps": 4}]
    ((number, grid, tensor, *others),) = kernel.launched
    assert (number, grid, others) == (0, GRID, [5, 4]) and tensor is y


def test_and_again_for_whatever_its_code_depends_on(kernel: FakeKernel) -> None:
    x = torch.zeros(16)
    calls = [
        lambda: kernel(x, 3),
        lambda: kernel(x.half(), 3),
        lambda: kernel(x[1:], 3),  # not at a multiple of 16 bytes
        lambda: kernel(x, 1),
        lambda: kernel(x, 48),
        lambda: kernel(x, 2**31 + 1),
        lambda: kernel(x, 3, block=8),
        lambda: kernel(x, 3, num_warps=8),
    ]
    assert [call() for call in calls] == list(range(1, len(calls) + 1))
    assert [call() for call in calls] == len(calls) * [len(calls)]
    assert [number for number, *_ in kernel.launched] == list(range(len(calls)))


def test_another_kernel_has_its_own_code(kernel: FakeKernel) -> None:
    another = FakeKernel()
    assert kernel(torch.zeros(16), 3) == another(torch.zeros(16), 3) == 1


def test_constants_are_the_last_parameters(kernel: FakeKernel) -> None:
    kernel.arg_names = ["x", "BLOCK", "count"]
    with pytest.raises(AssertionError, match=r"\['BLOCK'\] are not the last parameters"):
        kernel(torch.zeros(16), 3)


def test_the_interpreter_gets_names() -> None:
    """It compiles nothing that could be kept."""
    calls: list[Any] = []
    kernel = {GRID: lambda *arguments, **others: calls.append((*arguments, others))}
    x = torch.zeros(16)
    launch.launch(kernel, GRID, x, 3, options={"num_warps": 4}, BLOCK=8)
    assert calls == [(x, 3, {"BLOCK": 8, "num_warps": 4})]


def test_another_card_than_the_current_one_is_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], []

    class OnCard:
        def __init__(self, device: SimpleNamespace) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.append(self.device.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", OnCard)
    monkeypatch.setattr(launch, "_on_current_device", lambda *_: launched.append(current[-1]))
    for index in (0, 1):
        tensor = SimpleNamespace(device=SimpleNamespace(type="cuda", index=index))
        launch.launch(None, GRID, tensor, options={})
    assert launched == [0, 1] and current == [0]


@pytest.mark.parametrize(("a", "b"), [(1, 8), (8, 8), (9, 8), (0, 8)])
def test_rounding_up(a: int, b: int) -> None:
    assert cdiv(a, b) == -(-a // b) == (a + b - 1) // b


def test_powers_of_two() -> None:
    assert [power_of_2(each) for each in (0, 1, 2, 3, 4, 5, 1025)] == [1, 1, 2, 4, 4, 8, 2048]
