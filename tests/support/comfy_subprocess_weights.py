"""Inside ComfyUI: velocities of transformer files and latents of a VAE, both loaded by ComfyUI's own loaders.

Input: transformer files and a VAE width. Output: each file's velocity, and the weights of a random VAE of that width,
named as in Wan, with its latents and its reconstruction of a picture.
"""

from __future__ import annotations

from typing import Any

import comfy.ldm.wan.vae
import comfy.model_management
import comfy.sd
import torch
from torch import Tensor


def velocity(path: str, tensors: dict[str, Tensor]) -> Tensor:
    """Velocity [B, 16, H, W] of a transformer file, without references."""
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
    """Random weights of a VAE as deep as Qwen-Image's, named as in Wan, scaled to keep activations in range."""
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
    """Weights named as in the file, latents [1, 16, h, w] before normalisation, and the decoded picture."""
    weights = vae_weights(width)
    loaded = comfy.sd.VAE(sd=dict(weights))
    latents = loaded.encode(tensors["picture"])
    picture = loaded.decode(latents)
    answer = {f"vae.{name}": weight for name, weight in weights.items()}
    return {**answer, "vae latents": latents.float().flatten(1, -3), "vae picture": picture.float()}


@torch.no_grad()
def main(tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Velocities of all files, and the VAE's tensors."""
    answer = {name: velocity(path, tensors) for name, path in values["files"].items()}
    return {**answer, **vae(values["vae_width"], tensors)}, {}
