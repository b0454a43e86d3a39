"""Rectified flow: the straight path, its velocity, the draw of noise levels, and the learning rate."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from trainer_core.config import NoiseConfig, OptimizerConfig
from trainer_core.qwen_image.sampling import load_scheduler, sigma_schedule
from trainer_core.rng import stream
from trainer_core.training.objective import (
    add_noise,
    draw_sigma,
    loss_by_sigma,
    noisy_latents,
    shift_for,
    shift_sigma,
    velocity_loss,
)
from trainer_core.training.schedule import learning_rate_at


def draws(noise: NoiseConfig, tokens: int = 256, count: int = 4000) -> torch.Tensor:
    return torch.stack([draw_sigma(noise, tokens, stream(0, "sigma", index)) for index in range(count)])


def test_velocity_leads_from_latents_to_noise() -> None:
    latents, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    sigma = torch.tensor([0.25, 0.75])
    noisy = noisy_latents(latents, sigma, noise)
    step = sigma.view(-1, 1, 1, 1)
    torch.testing.assert_close(noisy.latents - step * noisy.target_velocity, latents)
    torch.testing.assert_close(noisy.latents + (1 - step) * noisy.target_velocity, noise)


@pytest.mark.parametrize("shift", [1.0, 1.73, 3.0])
def test_logit_normal_has_its_median_where_the_shift_puts_it(shift: float) -> None:
    sigmas = draws(NoiseConfig(flow_schedule_shift=shift))
    assert sigmas.min() > 0
    assert sigmas.max() < 1
    assert float(sigmas.median()) == pytest.approx(shift / (1 + shift), abs=0.02)


def test_uniform_is_uniform_before_the_shift() -> None:
    sigmas = draws(NoiseConfig(sigma_distribution="uniform", flow_schedule_shift=1.0))
    quantiles = torch.quantile(sigmas, torch.tensor([0.1, 0.5, 0.9]))
    torch.testing.assert_close(quantiles, torch.tensor([0.1, 0.5, 0.9]), atol=0.03, rtol=0)


def test_mean_and_deviation_are_those_of_the_logit() -> None:
    logits = torch.logit(draws(NoiseConfig(logit_mean=-0.5, logit_std=0.4, flow_schedule_shift=1.0)))
    assert float(logits.mean()) == pytest.approx(-0.5, abs=0.03)
    assert float(logits.std()) == pytest.approx(0.4, abs=0.02)


def test_auto_shift_grows_with_the_picture_as_in_qwens_schedule() -> None:
    auto = NoiseConfig(flow_schedule_auto_shift=True)
    assert shift_for(256, auto) == pytest.approx(math.exp(0.5))
    assert shift_for(8192, auto) == pytest.approx(math.exp(0.9))
    assert shift_for(4096, NoiseConfig()) == 1.73


def test_shift_is_the_odds_times_a_factor() -> None:
    sigma = torch.tensor([0.1, 0.5, 0.9])
    shifted = shift_sigma(sigma, 3.0)
    torch.testing.assert_close(shifted / (1 - shifted), 3 * sigma / (1 - sigma))


def test_a_pairs_noise_depends_on_its_turn_alone() -> None:
    latents = torch.randn(3, 16, 8, 8)
    together = add_noise(latents, NoiseConfig(), 7, [4, 5, 6])
    for row, index in enumerate((4, 5, 6)):
        alone = add_noise(latents[row : row + 1], NoiseConfig(), 7, [index])
        assert torch.equal(alone.latents[0], together.latents[row])
        assert torch.equal(alone.sigma[0], together.sigma[row])


def test_loss_is_per_pair_and_in_float32() -> None:
    velocity = torch.full((2, 1, 2, 2), 256.0, dtype=torch.bfloat16)
    target = torch.stack([torch.full((1, 2, 2), 255.0), torch.full((1, 2, 2), 256.0)])
    assert velocity_loss(velocity, target).tolist() == [1.0, 0.0]


def test_loss_by_sigma() -> None:
    assert loss_by_sigma([1.0, 3.0, 5.0], [0.05, 0.15, 1.0]) == {"0.0-0.2": 2.0, "0.8-1.0": 5.0}


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_sampling_goes_from_noise_to_picture(steps: int) -> None:
    sigmas = sigma_schedule(load_scheduler(Path("none")), steps, 256)
    assert len(sigmas) == steps + 1
    assert float(sigmas[0]) == 1 and float(sigmas[-1]) == 0
    assert bool((sigmas.diff() < 0).all())


def test_learning_rates() -> None:
    constant = OptimizerConfig(learning_rate=1e-3, lr_warmup_steps=4)
    rates = [learning_rate_at(step, 10, constant) for step in range(10)]
    assert rates[:4] == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4]) and set(rates[4:]) == {1e-3}
    linear = OptimizerConfig(learning_rate=1e-3, lr_warmup_steps=0, lr_scheduler="linear")
    assert [learning_rate_at(step, 4, linear) for step in range(5)] == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 0])
    cosine = OptimizerConfig(learning_rate=1e-3, lr_warmup_steps=0, lr_scheduler="cosine")
    assert [learning_rate_at(step, 2, cosine) for step in range(3)] == pytest.approx([1e-3, 5e-4, 0])
