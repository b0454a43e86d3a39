"""Part one of the pre-training: a narrow AutoencoderKLQwenImage."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from itertools import count
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, l1_loss, mse_loss

from .averaging import RunningAverage
from .pictures import PictureSource

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

CONFIG: dict[str, Any] = {
    "base_dim": 14,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
}
PEAK_RATE, WARM_UP = 1.5e-3, 200
LATENT_NOISE, LATENT_PENALTY, VARIANCE_PENALTY = 0.06, 2e-3, 1e-4
AT_ONCE = 4
SIZES = ((128, 128), (128, 128), (160, 160), (96, 160), (160, 96), (192, 128))
_LOG = logging.getLogger(__name__)


def new_vae() -> AutoencoderKLQwenImage:
    """An untrained VAE for single frames: all weights for other frames are zero."""
    from diffusers import AutoencoderKLQwenImage

    vae = AutoencoderKLQwenImage(**CONFIG)
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d):
                module.weight[:, :, :-1] = 0
        for name, parameter in vae.named_parameters():
            if "time_conv" in name:
                parameter.zero_()
    return vae


def flatten(vae: AutoencoderKLQwenImage) -> None:
    """Replace 3D convolutions by 2D ones, and norms by faster ones. Results for single pictures stay the same."""
    for module in vae.modules():
        if isinstance(module, nn.Conv3d):
            module.forward = MethodType(_flat_convolution, module)
        elif type(module).__name__ == "QwenImageRMS_norm":
            module.forward = MethodType(_flat_norm, module)


def _flat_convolution(self: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    if cache_x is not None:
        raise NotImplementedError("Single pictures only.")
    padding = (self._padding[2], self._padding[0])
    return conv2d(x.squeeze(2), self.weight[:, :, -1], self.bias, self.stride[1:], padding).unsqueeze(2)


def _flat_norm(self: Any, x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
    return x * (self.scale / norm).to(x.dtype) * self.gamma.to(x.dtype)


def encode(vae: AutoencoderKLQwenImage, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Raw latents (the mode) and log variance, [B, 16, H/8, W/8] each, of pictures [B, 3, H, W] in 0..1."""
    pixels = (pictures * 2 - 1).contiguous(memory_format=torch.channels_last)
    return vae.quant_conv(vae.encoder(pixels.unsqueeze(2))).squeeze(2).float().chunk(2, dim=1)


def decode(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Decode raw latents to pictures [B, 3, H, W] in about 0..1 (not clamped)."""
    return (vae.decoder(vae.post_quant_conv(latents.unsqueeze(2))).squeeze(2).float() + 1) / 2


def psnr(one: Tensor, other: Tensor) -> float:
    """The PSNR in dB of pictures in 0..1, from the mean squared error over all of them."""
    return -10 * math.log10(mse_loss(one.clamp(0, 1), other.clamp(0, 1)).item())


def train_vae(
    vae: AutoencoderKLQwenImage, source: PictureSource, held_out: Tensor, *, seconds: float, batch: int
) -> AutoencoderKLQwenImage:
    """Train for `seconds`. Returns the VAE with averaged weights, and the latents' mean and std in its config."""
    flatten(vae)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=PEAK_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = RunningAverage(vae, 0.999)
    start, step, elapsed = time.monotonic(), 0, 0.0
    supply = _supply(source, batch)
    while elapsed < seconds:
        rate = min(1.0, (step + 1) / WARM_UP) * max(0.01, math.cos(elapsed / seconds * math.pi / 2) ** 2)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        with torch.autocast(source.device.type, torch.bfloat16, enabled=source.device.type == "cuda"):
            loss = _loss(vae, source, next(supply))
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(vae)
        if step % 500 == 0:
            _LOG.info("vae step %d loss %.4f, %.2f dB at %.0f s", step, loss.item(), _quality(vae, held_out), elapsed)
        step, elapsed = step + 1, time.monotonic() - start
    average.copy_to(vae)
    vae.requires_grad_(False).eval()  # noqa: FBT003
    _set_statistics(vae, source)
    _LOG.info(
        "vae: %d steps, batch %d, %.2f dB, %.2f dB on negatives",
        step,
        batch,
        _quality(vae, held_out),
        _quality(vae, 1 - held_out),
    )
    return vae


def _supply(source: PictureSource, batch: int) -> Iterator[Tensor]:
    """Batches with as many pixels as `batch` pictures of 128 x 128. AT_ONCE batches are generated together."""
    for index in count():
        height, width = SIZES[index % len(SIZES)]
        size = batch * 128 * 128 // (height * width)
        pictures = source.batch(size * AT_ONCE, height, width)
        yield from pictures[torch.randperm(len(pictures), device=source.device)].split(size)


def _loss(vae: AutoencoderKLQwenImage, source: PictureSource, pictures: Tensor) -> Tensor:
    latents, log_variance = encode(vae, pictures)
    noise = torch.randn(latents.shape, device=source.device, generator=source.generator)
    decoded = decode(vae, latents + LATENT_NOISE * noise)
    error = l1_loss(decoded, pictures) + 4 * mse_loss(decoded, pictures)
    wanted = 2 * math.log(LATENT_NOISE)
    return error + LATENT_PENALTY * latents.square().mean() + VARIANCE_PENALTY * (log_variance - wanted).square().mean()


@torch.no_grad()
def _quality(vae: AutoencoderKLQwenImage, pictures: Tensor) -> float:
    return psnr(decode(vae, encode(vae, pictures)[0]), pictures)


@torch.no_grad()
def _set_statistics(vae: AutoencoderKLQwenImage, source: PictureSource) -> None:
    """Write the latents' mean and standard deviation per channel to the config."""
    latents = torch.cat([encode(vae, source.batch(64, 128, 128))[0] for _ in range(16)])
    mean, deviation = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    vae.register_to_config(
        latents_mean=[round(value, 5) for value in mean.tolist()],
        latents_std=[round(value, 5) for value in deviation.tolist()],
    )
