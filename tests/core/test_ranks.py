"""How several processes share the work, tested without starting them."""

from __future__ import annotations

import pytest
import torch

from trainer_core.conditioning.batches import BatchPlan, RankPlan
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import BatchingConfig
from trainer_core.device import peak_bytes
from trainer_core.errors import ConfigError, RunFolderError
from trainer_core.events import Stop
from trainer_core.ranks import SINGLE_PROCESS, Ranks, joined_ranks
from trainer_core.training.reduce import check_same_start


def test_alone_nothing_is_exchanged() -> None:
    values = torch.randn(3)
    assert SINGLE_PROCESS.leads and SINGLE_PROCESS.all_reduce_sum(values) is values
    assert [SINGLE_PROCESS.agree(stop) for stop in Stop] == list(Stop)
    assert SINGLE_PROCESS.all_gather_ints((3, -1)) == [(3, -1)]
    assert SINGLE_PROCESS.share([1, 2, 3]) == [1, 2, 3]
    with joined_ranks() as ranks:
        assert ranks is SINGLE_PROCESS


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of the second of two processes under torchrun, on a machine with one GPU."""
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda number: pytest.fail(f"it computes on GPU {number}"))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)


@pytest.mark.usefixtures("second_of_two")
def test_each_process_has_a_gpu_of_its_own() -> None:
    with (
        pytest.raises(
            ConfigError, match=r"device is 'cuda:0', but 2 processes can't share one device.*Set device to auto"
        ),
        joined_ranks("cuda:0"),
    ):
        pass
    with (
        pytest.raises(ConfigError, match=r"LOCAL_RANK is 1, but this machine has 1 GPUs, one per process"),
        joined_ranks("cuda"),
    ):
        pass
    with joined_ranks("cpu") as ranks:
        assert (ranks.rank, ranks.size) == (1, 2)


def test_the_peak_is_that_of_the_device_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "max_memory_allocated", lambda device=None: 7 if device == torch.device("cuda:1") else 0
    )
    assert peak_bytes(torch.device("cuda:1")) == 7 and peak_bytes(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("step", "change", "alike"), [(4, 0.0, True), (5, 0.0, False), (4, 1e-7, False)], ids=["same", "step", "a bit"]
)
def test_all_start_from_the_same_step_and_weights(
    step: int, change: float, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {"b": torch.ones(2, 3), "a": torch.zeros(2)}
    other = {"a": torch.zeros(2), "b": torch.ones(2, 3) + change}
    said: list[tuple[int, ...]] = []

    def all_gather_ints(_ranks: Ranks, numbers: tuple[int, ...]) -> list[tuple[int, ...]]:
        said.append(numbers)
        return said

    monkeypatch.setattr(Ranks, "all_gather_ints", all_gather_ints)
    check_same_start(Ranks(0, 2), 4, weights)
    if alike:
        check_same_start(Ranks(1, 2), step, other)
        return
    with pytest.raises(RunFolderError, match=rf"process 0: step 4, weights .*process 1: step {step}, weights"):
        check_same_start(Ranks(1, 2), step, other)


@pytest.mark.parametrize(("size", "per_step"), [(1, 4), (2, 2), (4, 1), (3, 2)])
def test_ranks_see_what_one_process_with_more_accumulation_sees(
    encoded: EncodedDataset, size: int, per_step: int
) -> None:
    plan = BatchPlan(encoded, BatchingConfig(train_batch_size=2), 3)
    parts = [RankPlan(plan, Ranks(rank, size), per_step) for rank in range(size)]
    steps = range(7)
    seen = [[part[step * per_step + at] for step in steps for at in range(per_step)] for part in parts]
    together = [seen[rank][step * per_step + at] for step in steps for rank in range(size) for at in range(per_step)]
    assert together == [plan[number] for number in range(len(steps) * size * per_step)]
    for step in steps:
        first = step * size * per_step
        draws = [draw for number in range(first, first + size * per_step) for draw in plan[number]]
        assert all(part.draws_of_step(step) == draws for part in parts)


def test_work_is_shared_out_whole() -> None:
    items = list(range(11))
    shares = [Ranks(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
