"""The picture autoencoder, with normalised latents at its border."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ModelFileError
from ..weights.source import open_weights
from .base_model import BaseModel
from .latents import VAE_FACTOR, denormalise, normalise

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage

_WAN_MARK, _WIDTH_FROM = "decoder.middle.0.residual.0.gamma", "decoder.norm_out.gamma"


def load_vae(base: BaseModel, device: torch.device) -> AutoencoderKLQwenImage:
    """The VAE of a base model for pictures, frozen; bf16 on accelerators, float32 on the CPU.

    Raises:
        ModelFileError: the folder or file holds no AutoencoderKLQwenImage.
    """
    place, config = base.folder.vae, base.config
    dtype = torch.bfloat16 if config.mixed_precision == "bf16" and device.type != "cpu" else torch.float32
    vae = _from_file(place, dtype) if place.is_file() else _from_folder(place, dtype)
    for_pictures(vae)
    return vae.to(device).eval().requires_grad_(False)  # noqa: FBT003


def for_pictures(vae: AutoencoderKLQwenImage) -> None:
    """Leave out what only a video needs, with the same result for a picture: a third of the work of its convolutions.

    The VAE is one of videos. Its convolutions are causal: before a video's first frame, and a picture is one, come
    frames of zeros, so that only the last slice of a kernel meets anything else.
    """
    from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d

    for module in list(vae.modules()):
        for name, child in module.named_children():
            if name == "time_conv":
                setattr(module, name, nn.Identity())  # between frames; not called for the first
            elif isinstance(child, QwenImageCausalConv3d):
                setattr(module, name, _PictureConv(child))


class _PictureConv(nn.Module):
    """x [B, in, 1, H, W] to [B, out, 1, H', W'], as the causal convolution that it takes the place of."""

    def __init__(self, conv: nn.Conv3d) -> None:
        super().__init__()
        self.weight = nn.Parameter(conv.weight[:, :, -1].detach().clone())
        self.bias = conv.bias
        self.stride, self.padding = conv.stride[1:], tuple(size // 2 for size in conv.kernel_size[1:])

    def forward(self, x: Tensor, cache: None = None) -> Tensor:  # noqa: ARG002 - of the frames before
        return functional.conv2d(x.squeeze(2), self.weight, self.bias, self.stride, self.padding).unsqueeze(2)


def _from_folder(place: Path, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    from diffusers import AutoencoderKLQwenImage

    try:
        return AutoencoderKLQwenImage.from_pretrained(place, torch_dtype=dtype, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"Can't load the VAE from {place}: {error}") from error


def _from_file(place: Path, dtype: torch.dtype) -> AutoencoderKLQwenImage:
    """A VAE of Qwen-Image's depth and the file's width, with Wan's or diffusers' names. It has 127 M parameters."""
    from diffusers import AutoencoderKLQwenImage

    source = open_weights(place, ("vae.", "first_stage_model."))
    with source.opened() as read:
        weights = {name: read(name).dequantise(dtype) for name in source.shapes}
    if _WAN_MARK in weights:
        from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

        weights = convert_wan_vae_to_diffusers(weights)
    if _WIDTH_FROM not in weights:
        raise ModelFileError(
            f"{place.name} is no Qwen-Image VAE: it has neither {_WAN_MARK} nor {_WIDTH_FROM}. Choose "
            "qwen_image_vae.safetensors from models/vae."
        )
    vae = AutoencoderKLQwenImage(base_dim=len(weights[_WIDTH_FROM])).to(dtype)
    wanted = vae.state_dict()
    wrong = [name for name, each in wanted.items() if name not in weights or weights[name].shape != each.shape]
    if wrong or len(weights) != len(wanted):
        unknown = [name for name in weights if name not in wanted]
        raise ModelFileError(
            f"{place.name} is no Qwen-Image VAE, or not whole: {len(wrong)} of {len(wanted)} weights are missing or of "
            f"another shape and {len(unknown)} are unknown, among them {(wrong + unknown)[0]}."
        )
    vae.load_state_dict(weights)
    return vae


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
    # Without the cache of `vae.encode` and `decode`, which holds copies of every layer's input for a next frame.
    moments = vae.quant_conv(vae.encoder(pixels[None, :, None]))
    latents = moments.chunk(2, dim=1)[0][0, :, 0].float().cpu()
    return normalise(latents, vae.config.latents_mean, vae.config.latents_std)


@torch.no_grad()
def decode_latents(vae: AutoencoderKLQwenImage, latents: Tensor) -> Tensor:
    """Picture [3, 8 H, 8 W] in 0..1 (float32, CPU) of normalised latents [C, H, W]."""
    raw = denormalise(latents.float(), vae.config.latents_mean, vae.config.latents_std)
    pixels = vae.decoder(vae.post_quant_conv(raw[None, :, None].to(vae.device, vae.dtype)))[0, :, 0]
    return ((pixels.float() + 1) / 2).clamp(0, 1).cpu()
