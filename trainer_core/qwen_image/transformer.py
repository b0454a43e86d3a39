"""The diffusion transformer: loaded frozen, and the one forward that training and sampling share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..config import DEMO_MODEL, ModelConfig
from ..errors import ModelFileError
from ..events import SILENT, Observer
from ..precision.quantise import quantise
from .flavours import FLAVOURS
from .folder import model_folder, read_json
from .latents import pack, pad_to_patches, token_shape, unpack
from .types import Condition

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Layers at the network's borders: under 2 % of the weights, and every token passes through them.
SENSITIVE_LAYERS = ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out")


def load_transformer(
    config: ModelConfig, device: torch.device, observer: Observer = SILENT
) -> QwenImageTransformer2DModel:
    """The frozen transformer of a base model on `device`, in the wanted precision.

    Raises:
        ModelFileError: no such transformer, or one of another flavour.
        Interrupted: the observer wants to stop.
    """
    from diffusers import QwenImageTransformer2DModel

    folder = model_folder(config).transformer
    _check_flavour(config, read_json(folder / "config.json"))
    observer.on_progress("Loading the transformer", 0, 1)
    try:
        transformer = QwenImageTransformer2DModel.from_pretrained(
            folder, torch_dtype=compute_dtype(config), local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(f"Can't load the transformer from {folder}: {error}") from error
    _set_zero_cond_t(transformer, FLAVOURS[config.flavour].zero_cond_t)
    transformer.requires_grad_(False).eval()  # noqa: FBT003
    quantise(transformer, config.base_model_precision, SENSITIVE_LAYERS, device, observer)
    observer.on_progress("Loading the transformer", 1, 1)
    return transformer.to(device)


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of unquantised weights and of matrix products."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def _check_flavour(config: ModelConfig, stored: dict[str, object]) -> None:
    if stored.get("_class_name") != "QwenImageTransformer2DModel":
        raise ModelFileError(
            f"{config.base!r} holds a {stored.get('_class_name')}, not a QwenImageTransformer2DModel. "
            "Choose a Qwen-Image-Edit download."
        )
    is_2511 = bool(stored.get("zero_cond_t"))
    if config.base != DEMO_MODEL and is_2511 != FLAVOURS[config.flavour].zero_cond_t:
        raise ModelFileError(
            f"{config.base!r} {'is' if is_2511 else 'is not'} a Qwen-Image-Edit-2511 (zero_cond_t is {is_2511} in "
            f"its config), but the flavour is {config.flavour}. Choose "
            f"{'edit-v3' if is_2511 else 'edit-v1 (Qwen-Image-Edit) or edit-v2 (2509)'}."
        )


def _set_zero_cond_t(transformer: QwenImageTransformer2DModel, value: bool) -> None:  # noqa: FBT001
    """The embedded demo model was trained for every flavour; real ones already agree."""
    transformer.zero_cond_t = value
    for block in transformer.transformer_blocks:
        block.zero_cond_t = value


def predict_velocity(
    transformer: QwenImageTransformer2DModel, latents_BCHW: Tensor, sigma_B: Tensor, condition: Condition
) -> Tensor:
    """Velocity [B, C, H, W] (noise minus latents) at noise level sigma in [0, 1].

    Tokens are [target, reference 1, reference 2, ...], as in the edit pipelines of diffusers; the prediction is cut
    to the target. Runs in the caller's autocast and grad mode.
    """
    height, width = latents_BCHW.shape[-2:]
    tokens = pack(latents_BCHW)
    references = [pad_to_patches(reference) for reference in condition.reference_latents]
    shapes = [token_shape(latents) for latents in (latents_BCHW, *references)]
    dtype = transformer.proj_out.weight.dtype
    prediction = transformer(
        hidden_states=torch.cat([tokens, *map(pack, references)], dim=1).to(dtype),
        timestep=sigma_B.to(dtype),
        encoder_hidden_states=condition.prompt_embeds.to(dtype),
        encoder_hidden_states_mask=condition.prompt_mask,
        img_shapes=[shapes] * latents_BCHW.shape[0],
        return_dict=False,
    )[0]
    return unpack(prediction[:, : tokens.shape[1]], height, width)
