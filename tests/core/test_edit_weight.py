"""Weights of the edit-aware loss on hand-made latents and pictures: exact values, noise, and where gradients go."""

from __future__ import annotations

import io
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from trainer_core.conditioning.encode_pictures import pixel_difference
from trainer_core.conditioning.pictures import to_tensor
from trainer_core.config import NoiseConfig
from trainer_core.config.training import EditWeightFrom
from trainer_core.demo.pictures import PAIRS
from trainer_core.training.edit_weight import (
    FLOOR,
    changed_region,
    combined_weights,
    edit_weights,
    latent_difference,
)
from trainer_core.training.objective import velocity_loss

SIDE = 16


def noise(strength: float, kind: str = "linear", source: str = "latents") -> NoiseConfig:
    return NoiseConfig(edit_weight=strength, edit_weight_kind=kind, edit_weight_from=source)  # type: ignore[arg-type]


def edited() -> tuple[Tensor, Tensor]:
    """Target and reference latents [2, 16, 16, 16]: the first pair differs in 4 x 4 latents, the second not at all."""
    reference = torch.randn(2, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
    target = reference.clone()
    target[0, :, 4:8, 6:10] += 2
    return target, reference


def weights_of(target: Tensor, reference: Tensor, config: NoiseConfig) -> Tensor:
    found = combined_weights(target, (reference,), None, None, config)
    assert found is not None
    return found


def first_linear(target: Tensor, reference: Tensor, strength: float) -> Tensor:
    """The weights of the version that had only these."""
    ones = torch.ones_like(target[:, :1])
    difference = (target - reference).abs().mean(dim=1, keepdim=True)
    smooth = avg_pool2d(difference, 3, 1, 1, count_include_pad=False)
    largest = smooth.amax(dim=(2, 3), keepdim=True)
    level = FLOOR + (1 - FLOOR) * torch.where(largest > 0, smooth / largest.clamp_min(1e-9), ones)
    return (1 - strength) * ones + strength * level / level.mean(dim=(2, 3), keepdim=True)


@pytest.mark.parametrize("strength", [0.3, 0.5, 1.0])
def test_the_default_weights_are_those_of_older_versions(strength: float) -> None:
    target, reference = edited()
    reference = reference + 0.1 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(2))
    found = weights_of(target, reference, NoiseConfig(edit_weight=strength))
    assert torch.equal(found, first_linear(target, reference, strength))


def test_linear_weights_follow_the_difference() -> None:
    target, reference = edited()
    weights = weights_of(target, reference, noise(1.0))
    assert weights.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert float(weights[0, 0, 14, 1] / weights[0, 0, 5, 7]) == pytest.approx(FLOOR, abs=1e-5)
    assert torch.allclose(weights[1], torch.ones(1))
    assert torch.allclose(weights_of(target, reference, noise(0.5)), 0.5 + 0.5 * weights)


def test_logarithmic_weights_follow_the_area() -> None:
    target, reference = edited()
    weights = weights_of(target, reference, noise(1.0, "logarithmic"))
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[3:9, 5:11] = True  # the edit and one latent around
    share = 36 / SIDE**2
    level = 1 - math.log2(share)
    mean = share * level + 1 - share
    assert weights[0, 0][inside].tolist() == pytest.approx([level / mean] * 36, rel=1e-5)
    assert weights[0, 0][~inside].tolist() == pytest.approx([1 / mean] * (SIDE**2 - 36), rel=1e-5)
    assert torch.equal(weights[1], torch.ones(1, SIDE, SIDE))  # no change
    blended = weights_of(target, reference, noise(0.25, "logarithmic"))
    assert torch.allclose(blended, 0.75 + 0.25 * weights)
    assert torch.equal(weights_of(target + 3, reference, noise(1.0, "logarithmic")), torch.ones(2, 1, SIDE, SIDE))


def test_a_small_edit_gets_more_weight_but_a_bounded_one() -> None:
    inside = []
    for size in (32, 8, 2):
        difference = torch.zeros(1, 1, 128, 128)
        difference[..., 10 : 10 + size, 10 : 10 + size] = 2.0
        weights = edit_weights(difference, noise(1.0, "logarithmic"))
        inside.append(float(weights[0, 0, 10, 10]))
        assert float(weights.mean()) == pytest.approx(1, abs=1e-5)
        assert float(weights.min()) > 0.75
    assert inside == sorted(inside)
    assert 3 < inside[0] < inside[-1] < 1 + math.log2(128 * 128 / 4)


def test_noise_is_no_change_and_does_not_hide_one() -> None:
    target, reference = edited()
    alone = changed_region(difference_of(target, reference), "latents")
    noisy = reference + 0.1 * torch.randn(reference.shape, generator=torch.Generator().manual_seed(3))
    found = changed_region(difference_of(target, noisy), "latents")
    assert torch.equal(found, alone)
    assert alone[0].sum() == 36 and not alone[1].any()


def difference_of(target: Tensor, reference: Tensor) -> Tensor:
    difference = latent_difference(target, reference)
    assert difference is not None
    return difference


@pytest.mark.parametrize(("source", "edit", "loud"), [("latents", 0.35, 0.12), ("pixels", 8.0, 3.0)])
def test_a_faint_edit_counts_if_the_rest_is_quiet(source: EditWeightFrom, edit: float, loud: float) -> None:
    difference = torch.zeros(1, 1, SIDE, SIDE)
    difference[..., 2:8, 2:8] = edit
    assert changed_region(difference, source)[..., 2:8, 2:8].all()
    assert not changed_region(difference + loud, source).any()
    spot = torch.zeros(1, 1, SIDE, SIDE)
    spot[..., 8, 8] = 4 * edit  # alone
    assert not changed_region(spot, source).any()


def test_a_change_of_the_whole_picture_is_no_region() -> None:
    difference = torch.rand(1, 1, SIDE, SIDE, generator=torch.Generator().manual_seed(4)) + 0.3
    assert changed_region(difference, "latents").all()


def test_other_sizes_and_shapes_and_masks() -> None:
    target, reference = edited()
    flat = torch.zeros_like(reference)
    larger = interpolate(flat, scale_factor=2, mode="nearest")
    for kind in ("linear", "logarithmic"):
        config = noise(1.0, kind)
        assert float(weights_of(target - reference, larger, config)[0, 0, 5, 7]) > 2
        assert torch.equal(weights_of(target, reference[..., :8], config), torch.ones(2, 1, SIDE, SIDE))
        mask = torch.zeros(2, 1, SIDE, SIDE)
        mask[..., :8] = 2
        both = combined_weights(target, (reference,), None, mask, config)
        assert both is not None and not both[..., 8:].any()
        assert both.mean(dim=(1, 2, 3)).tolist() == pytest.approx([1, 1], abs=1e-5)
        assert combined_weights(target, (), None, None, config) is None
        assert combined_weights(target, (), None, mask, noise(1.0, kind, "pixels")) is mask
    assert combined_weights(target, (reference,), None, mask, noise(0.0)) is mask


def test_pixels_take_the_place_of_latents() -> None:
    target, reference = edited()
    pixels = torch.zeros(2, 1, SIDE, SIDE)
    pixels[:, :, :2, :2] = 100.0
    for kind in ("linear", "logarithmic"):
        found = combined_weights(target, (reference,), pixels, None, noise(1.0, kind, "pixels"))
        assert found is not None and torch.equal(found, edit_weights(pixels, noise(1.0, kind, "pixels")))
        assert found[0, 0, 0, 0] > 2 > found[0, 0, 5, 7]
        without = combined_weights(target, (reference,), pixels, None, noise(1.0, kind))
        assert without is not None and without[0, 0, 0, 0] < 1


def test_the_difference_of_pixels_is_the_mean_of_each_block() -> None:
    reference = torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(5)) * 0.5
    target = reference.clone()
    target[:, 8:16, 24:32] += 30 / 255  # all of a block
    target[0, 0:8, 0:4] += 60 / 255  # one channel of half a block
    found = pixel_difference(target, reference)
    wanted = torch.zeros(1, 4, 6)
    wanted[0, 1, 3], wanted[0, 0, 0] = 30, 10
    assert torch.allclose(found, wanted, atol=1e-4)


@pytest.mark.parametrize("quality", [75, 90])
def test_jpeg_is_no_change(quality: int) -> None:
    """In demo photographs, in which the noise of JPEG is strong because they are small."""
    shares, kept = [], []
    for path in sorted((PAIRS / "reference").glob("*.png")):
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
        painted = np.array(picture)
        painted[32:72, 32:72] = 255 - painted[32:72, 32:72]
        pixels, region = to_tensor(picture), torch.zeros(SIDE, SIDE, dtype=torch.bool)
        region[3:10, 3:10] = True
        plain, changed = (to_tensor(as_jpeg(each, quality)) for each in (picture, Image.fromarray(painted)))
        shares.append(float(changed_region(pixel_difference(plain, pixels)[None], "pixels").mean()))
        found = changed_region(pixel_difference(changed, pixels)[None], "pixels")[0, 0] > 0
        kept.append(float((found & ~region).sum() / (~region).sum()))
        assert found[4:9, 4:9].float().mean() > 0.9
    assert np.mean(shares) < 0.06 and np.mean(kept) < 0.02


def as_jpeg(picture: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


@pytest.mark.parametrize("kind", ["linear", "logarithmic"])
@pytest.mark.parametrize("source", ["latents", "pixels"])
def test_gradients_concentrate_on_the_edit(kind: str, source: str) -> None:
    """For equal errors everywhere, the edit's share of the squared gradient rises with the strength."""
    target, reference = (each[:1] for each in edited())
    pixels = 50 * difference_of(target, reference)
    shares = []
    for strength in (0.0, 0.3, 0.6, 1.0):
        velocity = torch.zeros_like(target, requires_grad=True)
        weights = combined_weights(target, (reference,), pixels, None, noise(strength, kind, source))
        velocity_loss(velocity, torch.ones_like(target), weights).sum().backward()
        assert velocity.grad is not None
        squared = velocity.grad.square()
        shares.append(float(squared[..., 4:8, 6:10].sum() / squared.sum()))
    assert shares[0] == pytest.approx(16 / SIDE**2)
    assert shares == sorted(shares) and shares[-1] > 4 * shares[0]
