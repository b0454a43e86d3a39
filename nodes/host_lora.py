"""ComfyUI's LoRA loader: check that it applies an exported file correctly, and apply one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import comfy.lora
import comfy.lora_convert
import comfy.sd
import comfy.supported_models
import comfy.utils
import torch
from safetensors import safe_open

from ..trainer_core.adapters.reader import adapter_parts, changed_weight
from ..trainer_core.errors import ExportError

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


def check_lora_file(path: Path, num_layers: int) -> None:
    """Check that this ComfyUI applies every key of the LoRA file to a Qwen-Image model with the intended weight change.

    The model is built on the meta device, without weights, which takes a fraction of a second. Weights are compared
    for one layer of each shape and scale: ComfyUI computes the others alike, and all of them would take a minute.

    Raises:
        ExportError: ComfyUI ignores some keys, or changes a weight by a different amount.
    """
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    patches = _patches(lora, _key_map(num_layers), "the LoRA file")
    layers = {key.removeprefix("diffusion_model.").removesuffix(".weight"): key for key in patches}
    parts = adapter_parts(lora, layers, path.name)
    for layer, part in {(part.kind, part.shape, part.scale): (layer, part) for layer, part in parts.items()}.values():
        like_the_change = part.change().abs().mean().clamp_min(1e-12)  # a larger base would hide the change of a DoRA
        base = like_the_change.expand(part.shape).clone() if part.kind == "dora" else torch.zeros(part.shape)
        wanted, key = changed_weight(part, base), layers[layer]
        found = comfy.lora.calculate_weight([(1.0, patches[key], 1.0, None, None)], base, key)
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max())):
            raise ExportError(
                f"ComfyUI would change {key} by a different amount than training did. Report this as a bug."
            )


def num_blocks(path: Path) -> int:
    """The number of transformer blocks up to the last one that the LoRA file changes."""
    with safe_open(path, framework="pt") as file:  # type: ignore[no-untyped-call]
        found = (re.search(r"\.transformer_blocks\.([0-9]{1,4})\.", name) for name in file.keys())  # noqa: SIM118
        return max((int(match[1]) for match in found if match), default=0) + 1


def _key_map(num_layers: int) -> dict[str, str]:
    """Names that ComfyUI accepts in LoRA files for a Qwen-Image model, mapped to its parameter names."""
    config = comfy.supported_models.QwenImage(
        {"image_model": "qwen_image", "num_layers": num_layers, "in_channels": 64}
    )
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, device=torch.device("meta"))
    return comfy.lora.model_lora_keys_unet(model, {})


def apply_lora(model: ModelPatcher, path: Path, strength: float) -> ModelPatcher:
    """A copy of `model` with the LoRA file `path` applied.

    Raises:
        ExportError: some keys do not match a layer of the model.
    """
    lora = comfy.utils.load_torch_file(str(path), safe_load=True)
    _patches(lora, comfy.lora.model_lora_keys_unet(model.model, {}), path.name)
    return comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0]


def _patches(lora: dict[str, torch.Tensor], key_map: dict[str, str], name: str) -> dict[str, Any]:
    """ComfyUI's patches for the LoRA.

    Raises:
        ExportError: some keys do not match, or the LoRA is empty.
    """
    lora = comfy.lora_convert.convert_lora(lora)
    patches = comfy.lora.load_lora(lora, key_map, log_missing=False)
    matched = {key for patch in patches.values() for key in getattr(patch, "loaded_keys", ())}
    unmatched = sorted(set(lora) - matched)
    if not lora:
        raise ExportError(f"There is no weight in {name}. Choose another file.")
    if unmatched:
        raise ExportError(
            f"{len(unmatched)} of the {len(lora)} keys in {name} do not match a layer of the model, such as "
            f"{', '.join(unmatched[:5])}. Use the Qwen-Image-Edit model that the LoRA was trained for."
        )
    return patches
