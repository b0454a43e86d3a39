"""The picture autoencoder, with normalised latents at its border."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ModelFileError
from .folder import model_folder
from .latents import VAE_FACTOR, denormalise, normalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage


def load_vae(config: ModelConfig, device: torch.device) -> AutoencoderKLQwenImage:
    """The VAE of a base model, frozen; bf16 on accelerators, float32 on the CPU.

    Raises:
        ModelFileError: the folder holds no AutoencoderKLQwenImage.
    """
    from diffusers import AutoencoderKLQwenImage

    folder = model_folder(config).vae
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" and device.type != "cpu" else torch.float32
    try:
        vae = AutoencoderKLQwenImage.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"Can't load the VAE from {folder}: {error}") from error
    return vae.to(device).eval().requires_grad_(False)  # noqa: FBT003


@torch.no_grad()
def encode_picture(vae: AutoencoderKLQwenImage, picture: Tensor) -> Tensor:
    """Normalised latents [C, H/8, W/8] (float32, CPU): the posterior's mode, of a picture [3, H, W] in 0..1.

    Sides that are no multiple of 8 are cropped centrally, as ComfyUI's VAE does.
    """
    for dim in (1, 2):
        side = picture.shape[dim]
        kept = side // VAE_FACTOR * VAE_FACTOR
        picture = picture.narrow(dim, (side % VAE_FACTOR) // 2, kept)
    pixels = (picture * 2 - 1).to(vae.device, vae.dtype)
    latents = vae.encode(pixels[None, :, None]).latent_dist.mode()[0, :, 0].float().cpu()
    return normalise(latents, vae.config.latents_mean, vae.config.latents_std)


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Picture [3, 8 H, 8 W] in 0..1 (float32, CPU) of normalised latents [C, H, W]."""
    raw = denormalise(latents.float(), vae.config.latents_mean, vae.config.latents_std)
    pixels = vae.decode(raw[None, :, None].to(vae.device, vae.dtype), return_dict=False)[0][0, :, 0]
    return ((pixels.float() + 1) / 2).clamp(0, 1).cpu()
