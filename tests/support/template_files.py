"""The files that the templates name, as far as menus read them: headers with the right names and hardly any weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from tools.template_graphs import TEMPLATES

_FOLDERS = {"unet_name": "diffusion_models", "clip_name": "text_encoders", "vae_name": "vae", "lora_name": "loras"}
_WEIGHTS = {
    "diffusion_models": {
        "transformer_blocks.0.attn.add_k_proj.weight": (1, 1),
        "transformer_blocks.0.attn.norm_added_k.weight": (128,),
        "txt_norm.weight": (1,),
        "txt_in.weight": (1, 1),
        "img_in.weight": (1, 64),
        "proj_out.weight": (64, 1),
    },
    "text_encoders": {"visual.blocks.0.attn.qkv.bias": (1,), "model.layers.27.self_attn.k_proj.bias": (1,)},
}


def place_template_files(models: Path) -> None:
    """Write each file that a template names into the folder `models` of a ComfyUI."""
    for template in TEMPLATES:
        named = [(each["directory"], each["name"]) for each in template.models]
        for node in template.nodes():
            named += [(_FOLDERS[key], str(value)) for key, value in node.values.items() if key in _FOLDERS]
        for folder, name in named:
            path = models / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shapes = _WEIGHTS.get(folder, {"weight": (1,)})
            save_file({weight: torch.zeros(shape) for weight, shape in shapes.items()}, path)
