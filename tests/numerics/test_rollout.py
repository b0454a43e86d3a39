"""Scheduled sampling on flows with a known solution, and ReflexFlow's loss against its formula."""

from __future__ import annotations

import itertools
import math
from typing import Any, get_args

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, UniPCMultistepScheduler

from trainer_core.config import NoiseConfig, RolloutConfig
from trainer_core.config.training import RolloutSampler
from trainer_core.errors import ConfigError
from trainer_core.qwen_image.types import NoisyLatents
from trainer_core.training import rollout as rollout_module
from trainer_core.training.objective import noisy_latents, penalty_at, velocity_loss
from trainer_core.training.rollout import (
    RolledOut,
    compensation,
    direction_error,
    draw_offsets,
    integrate,
    reflexflow_loss,
    roll_out,
    rollout_probability,
    rollout_sigmas,
)

SAMPLERS = get_args(RolloutSampler)


def settings(**changes: Any) -> RolloutConfig:
    values = {"max_step_offset": 10, "probability": 1.0, "reflexflow": False, **changes}
    return RolloutConfig(**{f"scheduled_sampling_{name}": value for name, value in values.items()})


def even(begin: float, end: float, steps: int) -> list[float]:
    return [begin + (end - begin) * step / steps for step in range(steps + 1)]


def pair(sigma: float = 0.3) -> tuple[torch.Tensor, NoisyLatents]:
    """Latents [1, 4, 6, 6], and the same with noise at this sigma."""
    generator = torch.Generator().manual_seed(0)
    latents, noise = (torch.randn(1, 4, 6, 6, generator=generator) for _ in range(2))
    return latents, noisy_latents(latents, torch.tensor([sigma]), noise)


# The linear flow dx/dσ = a x has the solution x(σ) = x(s) exp(a (σ - s)).


@pytest.mark.parametrize("steps", [1, 4, 10])
def test_linear_flow_has_eulers_and_runge_kuttas_closed_forms(steps: int) -> None:
    a, begin, latents = 1.7, 0.8, torch.randn(1, 4, 3, 3)
    step = a * (0.3 - begin) / steps
    factor = {"euler": 1 + step, "rk4": 1 + step + step**2 / 2 + step**3 / 6 + step**4 / 24}
    for sampler, each in factor.items():
        ended = integrate(lambda x, _: a * x, latents, even(begin, 0.3, steps), sampler)
        torch.testing.assert_close(ended, latents * each**steps, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_linear_flow_is_approached_at_the_samplers_order(sampler: RolloutSampler) -> None:
    a, latents = 1.7, torch.full((1, 1, 1, 1), 1.0)
    exact = math.exp(a * (0.3 - 0.8))
    errors = [
        abs(float(integrate(lambda x, _: a * x, latents, even(0.8, 0.3, steps), sampler)) - exact) for steps in (5, 20)
    ]
    order = {"euler": 1, "unipc": 2, "dpm": 2, "rk4": 4}[sampler]
    assert errors[1] < errors[0] / 4**order * 1.5 + 2e-7


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_a_flow_towards_one_picture_is_followed_exactly(sampler: RolloutSampler, steps: int) -> None:
    """v = (x - picture) / σ leads straight to the picture: x(σ) = picture + (x(s) - picture) σ / s."""
    picture, latents = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    ended = integrate(lambda x, sigma: (x - picture) / sigma, latents, even(0.9, 0.2, steps), sampler)
    torch.testing.assert_close(ended, picture + (latents - picture) * (0.2 / 0.9), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [UniPCMultistepScheduler, DPMSolverMultistepScheduler])
def test_multistep_samplers_equal_diffusers_on_its_own_schedule(kind: Any) -> None:
    """diffusers' schedule ends at zero. The comparison stops one level earlier."""

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * x) + sigma * x

    scheduler = kind(prediction_type="flow_prediction", use_flow_sigmas=True, lower_order_final=False)
    scheduler.set_timesteps(9)
    begin = latents = torch.randn(1, 4, 3, 3)
    levels = scheduler.sigmas.tolist()[1:]  # without the first level, which is 1 or nearly 1
    scheduler.set_begin_index(1)
    for index in range(1, 8):
        predicted = velocity(latents, scheduler.sigmas[index])
        latents = scheduler.step(predicted, scheduler.timesteps[index], latents, return_dict=False)[0]
    ours = integrate(velocity, begin, levels[:8], "unipc" if kind is UniPCMultistepScheduler else "dpm")
    torch.testing.assert_close(ours, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_perfect_model_drifts_nowhere_and_a_biased_one_by_bias_times_span(sampler: RolloutSampler) -> None:
    _, noisy = pair()
    before = noisy.latents.clone()
    for bias in (0.0, 0.5):
        biased = noisy.target_velocity + bias
        rolled = roll_out(lambda _x, _s, biased=biased: biased, noisy, 8, settings(sampler=sampler))
        assert rolled.forwards == (32 if sampler == "rk4" else 8)
        torch.testing.assert_close(rolled.noisy.latents, before - 0.008 * bias, rtol=0, atol=2e-5)
        assert torch.equal(rolled.noisy.target_velocity, noisy.target_velocity)
        assert roll_out(lambda _x, _s, biased=biased: biased, noisy, 0, settings(sampler=sampler)).noisy is noisy
    assert torch.equal(noisy.latents, before)


def test_the_model_is_asked_at_the_levels_on_the_way_without_gradient() -> None:
    _, noisy = pair()
    asked: list[float] = []

    def velocity(latents: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        assert latents.shape == (1, 4, 6, 6) and sigma.shape == (1,) and not torch.is_grad_enabled()
        asked.append(round(float(sigma), 4))
        return latents

    roll_out(velocity, noisy, 3, settings(sampler="euler"))
    assert asked == [0.303, 0.302, 0.301]


@pytest.mark.parametrize(
    ("sigma", "offset", "steps", "begin"),
    [(0.5, 0, 0, 0.5), (0.5, 1, 1, 0.501), (0.5, 10, 10, 0.51), (0.995, 10, 4, 0.999), (0.9995, 10, 0, 0.9995)],
)
def test_rollouts_begin_below_pure_noise(sigma: float, offset: int, steps: int, begin: float) -> None:
    sigmas = rollout_sigmas(sigma, offset)
    assert len(sigmas) == steps + 1 and sigmas[0] == pytest.approx(begin) and sigmas[-1] == sigma
    assert all(a > b for a, b in itertools.pairwise(sigmas))


def test_probability_over_the_steps() -> None:
    def course(*steps: int, **changes: Any) -> list[float]:
        return [rollout_probability(step, settings(**changes)) for step in steps]

    assert course(0, 4, 5, 99, probability=0.3, start_step=5) == [0, 0, 0.3, 0.3]
    ramp = {"ramp_steps": 10, "start_step": 10, "prob_start": 0.2, "prob_end": 0.6}
    assert course(9, 10, 15, 20, 99, **ramp) == pytest.approx([0, 0.2, 0.4, 0.6, 0.6])
    assert course(10, 15, 20, **ramp, ramp_shape="cosine") == pytest.approx([0.2, 0.4, 0.6])
    assert course(12, **ramp, ramp_shape="cosine")[0] < course(12, **ramp)[0]
    down = {"ramp_steps": 10, "prob_start": 0.8, "prob_end": 0.0, "probability": 1.0}
    assert course(0, 5, 10, 50, **down) == pytest.approx([0.8, 0.4, 0, 0])  # a prob_end of 0 does not mean unset
    assert course(3, max_step_offset=0) == [0]


def test_offsets_are_a_turns_own_and_as_often_as_the_probability_says() -> None:
    indices = list(range(4000))
    drawn = draw_offsets(settings(probability=0.25), 0, 7, indices)
    assert draw_offsets(settings(probability=0.25), 3, 7, [11, 12]) == (drawn[11], drawn[12])
    assert sum(offset > 0 for offset in drawn) / 4000 == pytest.approx(0.25 * 10 / 11, abs=0.02)  # 1 offset of 11 is 0
    assert set(drawn) == set(range(11))
    means = {
        strategy: sum(draw_offsets(settings(strategy=strategy), 0, 7, indices)) / 4000
        for strategy in ("biased_early", "uniform", "biased_late")
    }
    # the means of floor(11 u), floor(11 u²) and floor(11 (1 - u²)) for uniform u
    assert means["uniform"] == pytest.approx(5.0, abs=0.15)
    assert means["biased_early"] == pytest.approx(3.23, abs=0.15)
    assert means["biased_late"] == pytest.approx(6.77, abs=0.15)
    assert set(draw_offsets(settings(max_step_offset=3), 0, 7, indices)) == {0, 1, 2, 3}  # as its help text says


def test_nothing_is_drawn_while_the_probability_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rollout_module, "stream", lambda *_: pytest.fail("a draw"))
    assert draw_offsets(settings(probability=0.0), 0, 7, [1, 2]) == (0, 0)
    assert draw_offsets(settings(max_step_offset=0), 0, 7, [1]) == (0,)
    assert draw_offsets(settings(start_step=5), 4, 7, [1]) == (0,)


def test_reflexflow_costs_one_forward_more_and_only_where_it_weighs() -> None:
    _, noisy = pair(0.6)
    for alpha, forwards in ((1.0, 6), (0.0, 5)):
        config = settings(reflexflow=True, reflexflow_alpha=alpha, sampler="dpm")
        rolled = roll_out(lambda x, _s: 2 * x, noisy, 5, config)
        assert rolled.forwards == forwards
        assert (rolled.exact_velocity is not None) == (alpha > 0)
        if rolled.exact_velocity is not None:
            assert torch.equal(rolled.exact_velocity, 2 * noisy.latents)


def rolled_out() -> tuple[torch.Tensor, torch.Tensor, RolledOut]:
    """Latents, a predicted velocity, and the input of a rolled-out pair."""
    latents, noisy = pair(0.6)
    generator = torch.Generator().manual_seed(1)
    moved = noisy.latents + 0.1 * torch.randn(1, 4, 6, 6, generator=generator)
    velocity = noisy.target_velocity + torch.randn(1, 4, 6, 6, generator=generator)
    exact = velocity + 0.3 * torch.randn(1, 4, 6, 6, generator=generator)
    return latents, velocity, RolledOut(NoisyLatents(moved, noisy.sigma, noisy.target_velocity), exact, 6)


def test_reflexflow_is_its_formula() -> None:
    latents, velocity, rolled = rolled_out()
    noise = NoiseConfig(loss_type="huber")
    penalty, target = penalty_at(rolled.noisy.sigma, noise), rolled.noisy.target_velocity
    config = settings(reflexflow=True, reflexflow_alpha=2.0, reflexflow_beta1=3.0, reflexflow_beta2=0.5)
    loss = reflexflow_loss(velocity, latents, rolled, weights=None, penalty=penalty, rollout=config)
    assert rolled.exact_velocity is not None
    change = (rolled.exact_velocity - velocity).abs()
    weights = (1 + 2.0 * change / change.mean()) / 3.0
    main = (weights * penalty(velocity - target)).mean()
    way = rolled.noisy.latents - latents
    turned = (velocity / velocity.norm() - way / way.norm()).square().sum()
    torch.testing.assert_close(loss, (0.5 * main + 3.0 * turned).view(1))


def test_without_its_factors_reflexflow_is_the_plain_loss() -> None:
    latents, velocity, rolled = rolled_out()
    config = settings(reflexflow=True, reflexflow_alpha=0.0, reflexflow_beta1=0.0, reflexflow_beta2=1.0)
    loss = reflexflow_loss(velocity, latents, rolled, weights=None, penalty=torch.square, rollout=config)
    torch.testing.assert_close(loss, velocity_loss(velocity, rolled.noisy.target_velocity))


def test_weights_have_mean_one_and_pass_on_no_gradient() -> None:
    latents, velocity, rolled = rolled_out()
    velocity.requires_grad_()
    weights = compensation(velocity.detach(), rolled, 5.0)
    assert float(weights.mean()) == pytest.approx(1.0, rel=1e-5) and float(weights.std()) > 0.3
    config = settings(reflexflow=True, reflexflow_beta1=0.0)
    reflexflow_loss(velocity, latents, rolled, weights=None, penalty=torch.square, rollout=config).sum().backward()
    assert velocity.grad is not None
    expected = compensation(velocity.detach(), rolled, 1.0) * 2 * (velocity.detach() - rolled.noisy.target_velocity)
    torch.testing.assert_close(velocity.grad, expected / velocity[0].numel())


def test_drift_is_zero_for_equal_and_four_for_opposite_directions_whatever_is_masked() -> None:
    way = torch.randn(1, 4, 6, 6)
    assert float(direction_error(3 * way, way)[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(direction_error(-way, way)[0]) == pytest.approx(4.0, rel=1e-5)
    mask, spoilt = torch.ones(1, 1, 6, 6), way.clone()
    mask[..., 0], spoilt[..., 0] = 0.0, 99.0
    assert float(direction_error(spoilt, way, mask)[0]) == pytest.approx(0.0, abs=1e-6)
    assert float(direction_error(spoilt, way)[0]) > 0.5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"max_step_offset": 1000}, "scheduled_sampling_max_step_offset must be 0 to 999"),
        ({"probability": 1.5}, "scheduled_sampling_probability must be 0 to 1"),
        ({"sampler": "unipcm"}, "Did you mean 'unipc'"),
        ({"order": 4}, "scheduled_sampling_order must be 1 to 3, got 4"),
        ({"reflexflow_beta1": -1.0}, "scheduled_sampling_reflexflow_beta1 must be 0 or more, got -1.0"),
    ],
)
def test_wrong_values_are_said(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        settings(**change)
