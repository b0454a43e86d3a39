"""Sigma distributions against diffusers and their formulas, stratified sigmas, and the loss penalties."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from trainer_core.config import NoiseConfig
from trainer_core.errors import ConfigError
from trainer_core.rng import stream
from trainer_core.training.objective import (
    add_noise,
    draw_sigma,
    huber_width,
    penalty_at,
    sigma_of_quantile,
    velocity_loss,
    with_offset,
)

DISTRIBUTIONS: dict[str, dict[str, Any]] = {
    "logit_normal": {"logit_mean": -0.4, "logit_std": 0.8},
    "uniform": {},
    "mode": {"mode_scale": 1.29},
    "cosmap": {},
}


def noise_of(distribution: str, **changes: Any) -> NoiseConfig:
    settings = {"sigma_distribution": distribution, "flow_schedule_shift": 1.0, **DISTRIBUTIONS[distribution]}
    return NoiseConfig(**{**settings, **changes})


def largest_gap(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference between the distribution functions of two samples (Kolmogorov-Smirnov)."""
    both = torch.cat([first, second]).sort().values
    shares = [torch.searchsorted(each.sort().values, both, right=True) / len(each) for each in (first, second)]
    return float((shares[0] - shares[1]).abs().max())


@pytest.mark.parametrize("scale", [-1.0, 0.0, 0.8, 1.29, 1.75])
def test_mode_equals_diffusers_number_for_number(scale: float) -> None:
    theirs = compute_density_for_timestep_sampling("mode", 500, mode_scale=scale, generator=stream(3, "u"))
    ours = sigma_of_quantile(torch.rand(500, generator=stream(3, "u")), noise_of("mode", mode_scale=scale))
    torch.testing.assert_close(ours, theirs, atol=2e-6, rtol=0)


def test_logit_normal_by_quantiles_and_by_draws_is_diffusers_distribution() -> None:
    noise, count = noise_of("logit_normal"), 4000
    theirs = compute_density_for_timestep_sampling("logit_normal", count, -0.4, 0.8, generator=stream(4, "normal"))
    drawn = torch.stack([draw_sigma(noise, 256, stream(0, "sigma", index)) for index in range(count)])
    even = sigma_of_quantile((torch.arange(count) + 0.5) / count, noise)
    assert largest_gap(drawn, theirs) < 0.04
    assert largest_gap(even, theirs) < 0.03
    assert largest_gap(drawn, sigma_of_quantile((torch.arange(count) + 0.5) / count, noise_of("uniform"))) > 0.1


def test_cosmap_draws_with_the_density_that_diffusers_weighs_the_loss_by() -> None:
    quantiles = torch.linspace(0.01, 0.99, 99, dtype=torch.float64).requires_grad_()
    sigmas = sigma_of_quantile(quantiles, noise_of("cosmap"))
    (slope,) = torch.autograd.grad(sigmas.sum(), quantiles)
    torch.testing.assert_close(1 / slope, compute_loss_weighting_for_sd3("cosmap", sigmas.detach()))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_levels_stay_in_the_open_range_at_the_ends(distribution: str) -> None:
    sigmas = sigma_of_quantile(torch.tensor([0.0, 1e-12, 0.5, 1.0]), noise_of(distribution))
    assert torch.isfinite(sigmas).all() and sigmas.min() >= 0 and sigmas.max() <= 1


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_steps_strata_share_the_range_and_keep_the_distribution(distribution: str) -> None:
    noise, per_step = noise_of(distribution, stratified_sigmas=True), 8
    latents = torch.zeros(per_step, 16, 4, 4)
    edges = sigma_of_quantile(torch.arange(per_step + 1) / per_step, noise).sort().values
    seen = []
    for step in range(60):
        turns = range(step * per_step, (step + 1) * per_step)
        sigma = add_noise(latents, noise, 7, list(turns), turns).sigma
        assert torch.bucketize(sigma, edges[1:-1]).sort().values.tolist() == list(range(per_step))
        seen.append(sigma)
    plain = add_noise(torch.zeros(480, 16, 4, 4), noise_of(distribution), 8, list(range(480))).sigma
    assert largest_gap(torch.cat(seen), plain) < 0.11
    first_turns = torch.stack(seen)[:, 0]
    assert first_turns.min() < edges[2] and first_turns.max() > edges[-3]  # a turn's stratum changes from step to step


def test_strata_do_not_depend_on_how_a_step_is_cut_into_micro_batches() -> None:
    noise, turns, latents = noise_of("uniform", stratified_sigmas=True), range(10, 16), torch.randn(6, 16, 4, 4)
    whole = add_noise(latents, noise, 7, list(turns), turns)
    for index in turns:
        alone = add_noise(latents[index - 10 : index - 9], noise, 7, [index], turns)
        assert torch.equal(alone.sigma[0], whole.sigma[index - 10])
        assert torch.equal(alone.latents[0], whole.latents[index - 10])


def test_without_strata_the_step_a_turn_is_in_changes_nothing() -> None:
    latents = torch.randn(2, 16, 4, 4)
    plain, in_step = (add_noise(latents, noise_of("mode"), 7, [3, 4], turns) for turns in (None, range(3, 9)))
    assert torch.equal(plain.sigma, in_step.sigma)


@pytest.mark.parametrize("stratified", [False, True])
def test_an_offset_is_added_to_the_normal_number(*, stratified: bool) -> None:
    """SimpleTuner's σ = sigmoid(scale · (normal + offset)), before the shift."""
    noise = noise_of("logit_normal", stratified_sigmas=stratified, flow_schedule_shift=1.0)
    turns, latents = range(10, 16), torch.zeros(6, 16, 4, 4)
    plain, shifted = (
        torch.logit(add_noise(latents, with_offset(noise, offset), 7, list(turns), turns).sigma.double())
        for offset in (0.0, -0.75)
    )
    torch.testing.assert_close((shifted + 0.4) / 0.8, (plain + 0.4) / 0.8 - 0.75, rtol=0, atol=2e-5)
    normal = torch.randn((), generator=stream(7, "sigma", 10))
    if not stratified:
        torch.testing.assert_close(shifted[0], (-0.4 + 0.8 * (normal - 0.75)).double(), rtol=0, atol=1e-5)
    assert with_offset(noise, 0.0) is noise, "a run without offsets draws the same bits as before"


@pytest.mark.parametrize("c", [0.05, 0.1, 0.5])
def test_huber_is_squared_for_small_errors_and_linear_for_large_ones(c: float) -> None:
    sigma = torch.tensor([0.3])
    huber, smooth = (
        penalty_at(sigma, NoiseConfig(loss_type=kind, huber_c=c, huber_schedule="constant"))
        for kind in ("huber", "smooth_l1")
    )
    small = torch.tensor([1e-4, -1e-3]).view(1, 2, 1, 1) * c
    torch.testing.assert_close(huber(small), small.square(), rtol=1e-5, atol=0)
    torch.testing.assert_close(smooth(small), small.square() / c, rtol=1e-5, atol=0)
    large = torch.tensor([-300.0, 50.0]).view(1, 2, 1, 1)
    torch.testing.assert_close(huber(large), 2 * c * (large.abs() - c), rtol=1e-4, atol=0)
    torch.testing.assert_close(smooth(large), 2 * (large.abs() - c), rtol=1e-4, atol=0)


def test_widths_of_huber_schedules() -> None:
    """snr has SimpleTuner's widths, computed with its formula at timesteps of 100, 500 and 900."""
    expected = {
        "snr": [0.100088, 0.156292, 0.325022, 0.606264, 1.0],
        "exponential": [1.0, 0.794328, 0.316228, 0.125893, 0.1],
        "constant": [0.1] * 5,
    }
    levels = torch.tensor([0.0, 0.1, 0.5, 0.9, 1.0], dtype=torch.float64)
    for schedule, widths in expected.items():
        found = huber_width(levels, NoiseConfig(loss_type="huber", huber_c=0.1, huber_schedule=schedule))
        assert found.tolist() == pytest.approx(widths, abs=1e-5), schedule


def test_huber_equals_its_formula_and_its_slope_is_bounded() -> None:
    error = torch.linspace(-4, 4, 81, dtype=torch.float64).view(1, 81, 1, 1).requires_grad_()
    noise = NoiseConfig(loss_type="huber", huber_c=0.2)
    width = float(huber_width(torch.tensor([0.5], dtype=torch.float64), noise))
    counted = penalty_at(torch.tensor([0.5], dtype=torch.float64), noise)(error)
    torch.testing.assert_close(counted, 2 * width * (torch.sqrt(error**2 + width**2) - width))
    (slope,) = torch.autograd.grad(counted.sum(), error)
    assert slope.abs().max() < 2 * width


def test_each_pair_has_the_width_of_its_own_level_and_weights_count() -> None:
    noise = NoiseConfig(loss_type="huber", huber_c=0.1, huber_schedule="exponential")
    sigma = torch.tensor([0.0, 1.0])
    velocity, target = torch.full((2, 1, 1, 2), 3.0), torch.zeros(2, 1, 1, 2)
    first, second = velocity_loss(velocity, target, None, penalty_at(sigma, noise)).tolist()
    assert first == pytest.approx(2 * (math.sqrt(10) - 1), rel=1e-5)
    assert second == pytest.approx(0.2 * (math.sqrt(9.01) - 0.1), rel=1e-5)
    weights = torch.tensor([2.0, 0.0]).expand(2, 1, 1, 2)
    velocity[..., 1] = 99.0  # an error where the weight is 0
    assert velocity_loss(velocity, target, weights, penalty_at(sigma, noise)).tolist() == pytest.approx([first, second])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mode_scale": 2.0}, "mode_scale must be -1 to 1.75"),
        ({"huber_c": 0.0}, "huber_c must be above 0"),
        ({"loss_type": "smooth-l1"}, "Did you mean 'smooth_l1'"),
        ({"sigma_distribution": "cos_map"}, "Did you mean 'cosmap'"),
    ],
)
def test_wrong_values_are_said(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        NoiseConfig(**change)
