"""The VAE reduced to pictures equals diffusers' original, which is a video VAE."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor

from tests.support.live_bytes import META, LiveBytes, flash_attention
from trainer_core.planning.plan import DECODING_ELEMENTS, ENCODING_ELEMENTS, VAE_WEIGHTS
from trainer_core.qwen_image.latents import denormalise, normalise
from trainer_core.qwen_image.vae import decode_latents, encode_picture, for_pictures


@pytest.fixture(scope="module")
def theirs() -> AutoencoderKLQwenImage:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoencoderKLQwenImage(base_dim=16).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def ours(theirs: AutoencoderKLQwenImage) -> AutoencoderKLQwenImage:
    vae = copy.deepcopy(theirs)
    for_pictures(vae)
    return vae


def borders(vae: AutoencoderKLQwenImage) -> tuple[list[float], list[float]]:
    return vae.config.latents_mean, vae.config.latents_std


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 48), (136, 72)])
def test_latents_and_pictures_are_diffusers(
    ours: AutoencoderKLQwenImage, theirs: AutoencoderKLQwenImage, size: tuple[int, int]
) -> None:
    picture = torch.rand(3, *size, generator=torch.Generator().manual_seed(1))
    wanted = theirs.encode(picture[None, :, None] * 2 - 1).latent_dist.mode()[0, :, 0]
    found = encode_picture(ours, picture)
    assert close(found, normalise(wanted, *borders(theirs)))
    raw = denormalise(found, *borders(theirs))[None, :, None]
    wanted = (theirs.decode(raw).sample[0, :, 0] / 2 + 0.5).clamp(0, 1)
    assert close(decode_latents(ours, found), wanted)


def close(found: Tensor, wanted: Tensor) -> bool:
    assert found.shape == wanted.shape
    assert wanted.std() > 0.01
    return bool((found - wanted).abs().max() < 1e-5)


def test_what_it_takes_is_what_is_planned() -> None:
    with META:
        vae = AutoencoderKLQwenImage().to(torch.bfloat16).requires_grad_(False)
    whole = sum(weight.numel() for weight in vae.parameters())
    for_pictures(vae)
    weights = sum(weight.numel() for weight in vae.parameters())
    assert weights == VAE_WEIGHTS < whole / 2
    for height, width in ((512, 512), (768, 1344)):
        picture = torch.empty(1, 3, 1, height, width, dtype=torch.bfloat16, device=META)
        latents = torch.empty(1, 16, 1, height // 8, width // 8, dtype=torch.bfloat16, device=META)
        encoding = peak(lambda: vae.quant_conv(vae.encoder(picture)))  # noqa: B023
        decoding = peak(lambda: vae.decoder(vae.post_quant_conv(latents)))  # noqa: B023
        assert encoding / (height * width) == pytest.approx(2 * ENCODING_ELEMENTS, rel=0.01)
        assert decoding / (height * width) == pytest.approx(2 * DECODING_ELEMENTS, rel=0.01)


@torch.no_grad()
def peak(call: Callable[[], Tensor]) -> int:
    with flash_attention(), LiveBytes() as live:
        call()
    return live.peak
