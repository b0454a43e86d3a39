"""A transformer file with random weights that both diffusers and ComfyUI read, and a relative error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import QwenImageTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from trainer_core.rng import stream


def save_base(folder: Path, config: dict[str, Any]) -> Path:
    """Write a base model whose transformer has random bfloat16 weights; returns the transformer's file."""
    with torch.device("meta"):
        empty = QwenImageTransformer2DModel(**config)
    generator, weights = stream(0, "comfyui base"), {}
    for name, parameter in empty.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.bfloat16)
        is_matrix = parameter.ndim > 1
        weights[name] = drawn / parameter.shape[1] ** 0.5 if is_matrix else drawn * 0.1 + ("norm" in name)
    empty.save_config(folder / "transformer")
    path = folder / "transformer/diffusion_pytorch_model.safetensors"
    save_file(weights, path)
    for part in ("vae", "text_encoder"):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text("{}")
    return path


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Norm of the difference divided by the norm of `wanted`."""
    assert found.shape == wanted.shape
    return float((found - wanted).norm() / wanted.norm())
