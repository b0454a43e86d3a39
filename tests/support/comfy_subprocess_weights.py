"""Inside ComfyUI: velocities of transformers and latents of a VAE, from files as its own loaders read them.

Asked for transformer files and a VAE width; answers each file's velocity, and a VAE of that width in Wan's names with
what it makes of a picture.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor


def velocity(path: str, tensors: dict[str, Tensor]) -> Tensor:
    """[B, 16, H, W] without references."""
    patcher = comfy.sd.load_diffusion_model(path)
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    model, latents = patcher.model, tensors["latents"].unsqueeze(2)
    conditions = model.extra_conds(noise=latents, device=latents.device, cross_attn=tensors["prompt"])
    conditions = {name: each.cond for name, each in conditions.items()}
    denoised = model.apply_model(latents, tensors["sigma"], **conditions)
    found = ((latents - denoised) / tensors["sigma"].view(-1, 1, 1, 1, 1)).squeeze(2).float()
    comfy.model_management.unload_all_models()
    return found


def vae_weights(width: int) -> dict[str, Tensor]:
    """A VAE of Qwen-Image's depth, in Wan's names, random but lively."""
    network = comfy.ldm.wan.vae.WanVAE(
        dim=width, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2, attn_scales=[], dropout=0.0,
        temperal_downsample=[False, True, True],
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, parameter in network.state_dict().items():
        drawn = torch.randn(parameter.shape, generator=generator)
        weights[name] = drawn / parameter[0].numel() ** 0.5 if parameter.ndim > 3 else drawn * 0.1 + ("gamma" in name)
    return weights


def vae(width: int, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as the file has them, latents [1, 16, h, w] before normalisation, and the picture decoded again."""
    weights = vae_weights(width)
    loaded = comfy.sd.VAE(sd=dict(weights))
    latents = loaded.encode(tensors["picture"])
    picture = loaded.decode(latents)
    answer = {f"vae.{name}": weight for name, weight in weights.items()}
    return {**answer, "vae latents": latents.float().flatten(1, -3), "vae picture": picture.float()}


@torch.no_grad()
def main(tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All files."""
    answer = {name: velocity(path, tensors) for name, path in values["files"].items()}
    return {**answer, **vae(values["vae_width"], tensors)}, {}
