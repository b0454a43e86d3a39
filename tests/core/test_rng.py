"""Randomness is a function of (seed, purpose, index)."""

from __future__ import annotations

import torch

from trainer_core.rng import seeded_globally, stream


def test_equal_arguments_draw_equally_and_others_do_not() -> None:
    def draw(*arguments) -> list[float]:
        return torch.rand(4, generator=stream(*arguments)).tolist()

    assert draw(1, "noise", 5) == draw(1, "noise", 5)
    assert (
        len({tuple(draw(*each)) for each in ((1, "noise", 5), (2, "noise", 5), (1, "sigma", 5), (1, "noise", 6))}) == 4
    )


def test_pinned_across_platforms_and_versions() -> None:
    assert torch.randint(1000, (3,), generator=stream(0, "order", 0)).tolist() == PINNED


PINNED = [479, 204, 391]


def test_the_process_wide_generator_is_untouched() -> None:
    before = torch.get_rng_state()
    stream(3, "x").get_state()
    with seeded_globally(1, "dropout", 2, torch.device("cpu")):
        first = torch.rand(3)
    with seeded_globally(1, "dropout", 2, torch.device("cpu")):
        assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.get_rng_state(), before)
