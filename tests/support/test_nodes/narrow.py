"""A narrow Qwen-Image MODEL, built by hand because ComfyUI's loader accepts only full-width ones."""

from __future__ import annotations

import json
from pathlib import Path

import comfy.model_management
import comfy.model_patcher
import comfy.supported_models
import comfy.utils
import folder_paths
import torch

from .base import Node

PREFIX = "diffusion_model."


class NarrowModel(Node):
    """The first `num_layers` blocks of the transformer of a narrow base model below models/diffusers."""

    RETURN_TYPES = ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802 - ComfyUI's name
        return {"required": {"base": ("STRING", {}), "num_layers": ("INT", {"default": 2})}}

    def run(self, base, num_layers):
        folder = Path(folder_paths.get_folder_paths("diffusers")[0]) / base / "transformer"
        given = json.loads((folder / "config.json").read_text())
        names = ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "axes_dims_rope", "in_channels")
        sizes = {name: given[name] for name in names}
        config = comfy.supported_models.QwenImage({"image_model": "qwen_image", "num_layers": num_layers, **sizes})
        device = comfy.model_management.get_torch_device()
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=device)
        weights = comfy.utils.load_torch_file(str(folder / "diffusion_pytorch_model.safetensors"))
        model.load_model_weights({PREFIX + name: tensor for name, tensor in weights.items()}, PREFIX)
        missing = set(model.diffusion_model.state_dict()) - set(weights)
        assert not missing, missing
        return (comfy.model_patcher.ModelPatcher(model, device, comfy.model_management.unet_offload_device()),)


class Condition(Node):
    """A random CONDITIONING with one reference latent."""

    RETURN_TYPES = ("CONDITIONING",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {"width": ("INT", {"default": 128}), "seed": ("INT", {"default": 0})}}

    def run(self, width, seed):
        generator = torch.Generator().manual_seed(seed)
        prompt = torch.randn(1, 8, width, generator=generator)
        reference = torch.randn(1, 16, 1, 8, 8, generator=generator)
        return ([[prompt, {"reference_latents": [reference]}]],)


class Latent(Node):
    """An empty LATENT of 64 x 64 pixels."""

    RETURN_TYPES = ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls):  # noqa: N802
        return {"required": {}}

    def run(self):
        return ({"samples": torch.zeros(1, 16, 1, 8, 8)},)
