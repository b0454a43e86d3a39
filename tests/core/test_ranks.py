"""What each of several processes does, without starting any."""

from __future__ import annotations

import pytest
import torch

from trainer_core.conditioning.batches import BatchPlan, RankPlan
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import BatchingConfig
from trainer_core.events import Stop
from trainer_core.ranks import ALONE, Ranks, joined_ranks


def test_alone_nothing_is_exchanged() -> None:
    values = torch.randn(3)
    assert ALONE.leads and ALONE.add_up(values) is values
    assert [ALONE.agree(stop) for stop in Stop] == list(Stop)
    assert ALONE.share([1, 2, 3]) == [1, 2, 3]
    with joined_ranks() as ranks:
        assert ranks is ALONE


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
