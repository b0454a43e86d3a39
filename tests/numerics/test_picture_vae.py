"""The VAE reduced to pictures equals diffusers' original, which is a video VAE."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tests.support.live_bytes import META, LiveBytes, flash_attention
from trainer_core.planning.plan import VAE_WEIGHTS
from trainer_core.planning.workload import ATTENTION, CONVOLUTION
from trainer_core.qwen_image import vae_tiles
from trainer_core.qwen_image.latents import denormalise, normalise
from trainer_core.qwen_image.vae import decode_latents, encode_picture, for_pictures
from trainer_core.qwen_image.vae_tiles import DECODING_ELEMENTS, ENCODING_ELEMENTS, decode_raw, encode_raw


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


@pytest.fixture(scope="module")
def full_size() -> AutoencoderKLQwenImage:
    """The VAE without memory."""
    with META:
        vae = AutoencoderKLQwenImage().to(torch.bfloat16).requires_grad_(False)
    for_pictures(vae)
    return vae


def test_what_it_takes_is_what_is_planned(full_size: AutoencoderKLQwenImage, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = sum(weight.numel() for weight in full_size.parameters())
    assert weights == VAE_WEIGHTS
    for height, width in ((512, 512), (768, 1344)):
        picture = torch.empty(1, 3, 1, height, width, dtype=torch.bfloat16, device=META)
        latents = torch.empty(1, 16, 1, height // 8, width // 8, dtype=torch.bfloat16, device=META)
        assert peak(encode_raw, full_size, picture) == pytest.approx(2 * ENCODING_ELEMENTS * height * width, rel=0.01)
        assert peak(decode_raw, full_size, latents) == pytest.approx(2 * DECODING_ELEMENTS * height * width, rel=0.01)
    monkeypatch.setattr(vae_tiles, "free_bytes", lambda _: 0)
    for height, width in ((512, 512), (768, 1024)):
        latents = torch.empty(1, 16, 1, height // 8, width // 8, dtype=torch.bfloat16, device=META)
        least = vae_tiles.least_decoding_bytes(height, width, 2)
        assert peak(decode_raw, full_size, latents) == pytest.approx(least, rel=0.05)
        picture = torch.empty(1, 3, 1, height, width, dtype=torch.bfloat16, device=META)
        least = vae_tiles.least_encoding_bytes(height, width, 2)
        assert peak(encode_raw, full_size, picture) == pytest.approx(least, rel=0.05)


@torch.no_grad()
@pytest.mark.parametrize("size", [(512, 512), (768, 1344)])
def test_its_operations_are_what_is_planned(full_size: AutoencoderKLQwenImage, size: tuple[int, int]) -> None:
    with FlopCounterMode(display=False) as counted:
        encode_raw(full_size, torch.empty(1, 3, 1, *size, dtype=torch.bfloat16, device=META))
    pixels = size[0] * size[1]
    assert counted.get_total_flops() == pytest.approx(CONVOLUTION * pixels + ATTENTION * pixels**2, rel=1e-3)


@torch.no_grad()
def peak(call: Callable[[AutoencoderKLQwenImage, Tensor], Tensor], vae: AutoencoderKLQwenImage, x: Tensor) -> int:
    with flash_attention(), LiveBytes() as live:
        call(vae, x)
    return live.peak


SIZE = 72, 66  # latents: three by three tiles with the smallest side


@pytest.fixture(scope="module")
def thin() -> AutoencoderKLQwenImage:
    """The VAE with all its layers, but few channels."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vae = AutoencoderKLQwenImage(base_dim=4).eval().requires_grad_(False)
    for_pictures(vae)
    return vae


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_tiles_give_the_whole_picture(
    thin: AutoencoderKLQwenImage, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At the seams too. In float64 this fails if a margin is one latent too narrow. The others differ by less than the
    rounding of the whole picture, which depends on the convolutions that a processor and its number of threads get."""
    vae, precise = copy.deepcopy(thin).to(dtype), copy.deepcopy(thin).double()
    latents = torch.randn(1, 16, 1, *SIZE, generator=torch.Generator().manual_seed(2)).to(dtype)
    pixels = torch.rand(2, 3, 1, *(8 * side for side in SIZE), generator=torch.Generator().manual_seed(3)).to(dtype)
    for call, x in ((decode_raw, latents), (encode_raw, pixels)):
        tiles = Counted(monkeypatch)
        whole = call(vae, x)
        assert tiles.number == 1
        monkeypatch.setattr(vae_tiles, "free_bytes", lambda _: 0)
        tiled = call(vae, x)
        monkeypatch.undo()
        assert tiles.number == 1 + 3 * 3
        assert whole.float().std() > 0.01 and tiled.shape == whole.shape
        exact = call(precise, x.double())
        rounding = (whole - exact).abs().max()
        largest = exact.abs().max()
        assert (tiled.double() - whole.double()).abs().max() < min(rounding, 2e-2 * largest) + 1e-9 * largest


class Counted:
    """Counts tiles."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.number = 0
        original = vae_tiles._joined

        def joined(layers: Callable[[Tensor], Tensor], *rest: Any) -> Tensor:
            def one(x: Tensor) -> Tensor:
                self.number += 1
                return layers(x)

            return original(one, *rest)

        monkeypatch.setattr(vae_tiles, "_joined", joined)


@torch.no_grad()
def test_a_picture_that_does_not_fit_after_all_is_tiled_until_it_does(
    thin: AutoencoderKLQwenImage, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = torch.randn(1, 16, 1, 140, 40, generator=torch.Generator().manual_seed(2))
    whole = decode_raw(thin, latents)
    asked: list[int] = []
    most_rows = 83

    def limited(_: Any, inputs: tuple[Tensor]) -> None:
        asked.append(inputs[0].shape[-2])
        if asked[-1] > most_rows:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = thin.decoder.up_blocks[0].register_forward_pre_hook(limited)
    try:
        assert (decode_raw(thin, latents) - whole).abs().max() < 1e-5
        assert asked == [140, 70 + 13, 70 + 13]
        most_rows = 10
        with pytest.raises(torch.OutOfMemoryError):
            decode_raw(thin, latents)
    finally:
        hook.remove()
