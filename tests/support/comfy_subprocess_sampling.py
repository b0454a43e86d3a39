"""Inside ComfyUI: latents that its KSampler draws from given noise, as an edit template does."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sample
import comfy.sd
import comfy.utils
import torch
from comfy_extras.nodes_cfg import CFGNorm
from comfy_extras.nodes_model_advanced import ModelSamplingAuraFlow
from comfy_subprocess_lora import load
from torch import Tensor


def drawn(values: dict[str, Any], tensors: dict[str, Tensor], case: dict[str, Any]) -> Tensor:
    """Latents [1, 16, H, W], as KSampler returns them: not normalised."""
    model = load(values, getattr(torch, case["dtype"]))
    for file in case["lora_files"]:
        lora = comfy.utils.load_torch_file(file, safe_load=True)
        model, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 1.0)
    (model,) = ModelSamplingAuraFlow().patch_aura(model, case["shift"])
    (model,) = CFGNorm.execute(model, 1.0).args
    references = [tensors["reference"].unsqueeze(2)]
    positive, negative = (
        [[tensors[name], {"reference_latents": references, "reference_latents_method": "index"}]]
        for name in ("prompt", "negative")
    )
    noise = tensors["noise"].unsqueeze(2)
    latents = comfy.sample.sample(
        model,
        noise,
        case["steps"],
        case["cfg"],
        "euler",
        "simple",
        positive,
        negative,
        torch.zeros_like(noise),
        disable_pbar=True,
        seed=0,
    )
    return latents.squeeze(2).float()


@torch.no_grad()
def main(tensors: dict[str, Tensor], values: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The latents of each of `cases` by its name."""
    return {name: drawn(values, tensors, case) for name, case in values["cases"].items()}, {}
