"""Inside ComfyUI: velocities of a transformer, full-width or narrow, with and without LoRA files."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.ldm.qwen_image.model
import comfy.lora
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from torch import Tensor

SUPPORTS_TIMESTEP_ZERO = "timestep_zero" in inspect.getsource(comfy.ldm.qwen_image.model)


def load(values: dict[str, Any], dtype: torch.dtype = torch.float32) -> comfy.model_patcher.ModelPatcher:
    """The model as UNETLoader loads it, or a narrow one of the same classes, which ComfyUI's detection would reject."""
    if not values["narrow"]:
        return comfy.sd.load_diffusion_model(values["model_file"], model_options={"dtype": dtype})
    config = comfy.supported_models.QwenImage({"image_model": "qwen_image", "in_channels": 64, **values["narrow"]})
    config.set_inference_dtype(dtype, None)
    state = comfy.utils.load_torch_file(values["model_file"])
    model = config.get_model(state, "")
    model.load_model_weights(state, "")
    cpu = torch.device("cpu")
    return comfy.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def velocity(model: Any, case: dict[str, Any], tensors: dict[str, Tensor], level: float | None) -> Tensor:
    """Velocity [B, 16, H, W], called as the sampler does; reference latents are not normalised, as in CONDITIONING.

    The noise level is the case's own unless `level` is given.
    """
    latents, sigma = tensors[f"{case['name']}.latents"].unsqueeze(2), tensors[f"{case['name']}.sigma"]
    if level is not None:
        sigma = torch.full_like(sigma, level)
    references = [tensors[f"{case['name']}.reference.{n}"].unsqueeze(2) for n in range(case["references"])]
    conditions = model.extra_conds(
        noise=latents,
        device=latents.device,
        cross_attn=tensors[f"{case['name']}.prompt"],
        reference_latents=references,
        reference_latents_method=case["method"],
    )
    conditions = {name: each.cond for name, each in conditions.items()}
    denoised = model.apply_model(latents, sigma, **conditions)
    return ((latents - denoised) / sigma.view(-1, 1, 1, 1, 1)).squeeze(2)


def velocities(
    patcher: comfy.model_patcher.ModelPatcher,
    values: dict[str, Any],
    tensors: dict[str, Tensor],
    name: str,
    level: float | None = None,
) -> dict[str, Tensor]:
    """Velocities of all cases that this ComfyUI version supports, as `<name>.<case>`."""
    comfy.model_management.load_models_gpu([patcher], force_full_load=True)
    cases = [each for each in values["cases"] if SUPPORTS_TIMESTEP_ZERO or each["method"] != "index_timestep_zero"]
    return {f"{name}.{case['name']}": velocity(patcher.model, case, tensors, level) for case in cases}


@torch.no_grad()
def main(tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Velocities of all cases without a LoRA and with each of `lora_files`, and the layers that each file patches.

    `bf16` names cases by noise level: their velocities in bfloat16 without a LoRA are `bf16 at <level>.<case>`.
    """
    patcher = load(values)
    answer = velocities(patcher, values, tensors, "base")
    layers = {}
    for name, file in values["lora_files"].items():
        lora = comfy.utils.load_torch_file(file, safe_load=True)
        patched, _ = comfy.sd.load_lora_for_models(patcher, None, lora, values.get("strength", 1.0), 1.0)
        answer.update(velocities(patched, values, tensors, name))
        layers[name] = sorted(key.removeprefix("diffusion_model.").removesuffix(".weight") for key in patched.patches)
    rounded = load(values, torch.bfloat16) if values.get("bf16") else None
    for level, names in values.get("bf16", {}).items():
        asked = {**values, "cases": [case for case in values["cases"] if case["name"] in names]}
        found = velocities(rounded, asked, tensors, f"bf16 at {level}", float(level))
        answer |= {name: each.float() for name, each in found.items()}
    return answer, {"layers": layers, "supports_timestep_zero": SUPPORTS_TIMESTEP_ZERO}
