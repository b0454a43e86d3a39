"""The diffusion transformer: loading it frozen, and the forward that training and sampling share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..events import SILENT, Observer
from ..precision.materialise import Placement, materialise
from .base_model import BaseModel, compute_dtype
from .frozen_forward import Through, predict_tokens
from .latents import pack, pad_to_patches, token_shape, unpack
from .quantised_entry import quantised_entry
from .types import Condition

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Input and output layers that are never quantised: under 2 % of the weights, but they affect every token.
SENSITIVE_LAYERS = ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out")


def load_transformer(
    base: BaseModel, device: torch.device, observer: Observer = SILENT, *, on_host: Collection[int] = ()
) -> QwenImageTransformer2DModel:
    """Load a base model's transformer block by block onto `device`, frozen and in the configured precision.

    Blocks with numbers in `on_host` go to host memory. The network's forward is that of `optimise_frozen_forward`.

    Raises:
        ModelFileError: the transformer is missing, damaged, another model, or of another flavour.
        MissingPackageError: the precision or the file format needs a package that is not installed.
        Interrupted: the observer wants to stop.
    """
    config = base.config
    network = base.new_network()  # first, because it raises for a wrong model before a large file is opened
    source = base.transformer_weights
    placement = Placement(
        precision=config.base_model_precision,
        dtype=compute_dtype(config),
        device=device,
        quantise_on=torch.device("cpu") if config.quantize_via == "cpu" else device,
        keep=SENSITIVE_LAYERS,
        on_host=tuple(f"transformer_blocks.{number}." for number in on_host),
        quantise_inputs=config.quantize_activations,
    )
    cache = quantised_entry(config, source, placement)
    materialise(network, source, placement, "Loading the transformer", observer, cache)
    return network


def predict_velocities(
    transformer: QwenImageTransformer2DModel,
    latents: Sequence[Tensor],
    sigma_B: Tensor,
    conditions: Sequence[Condition],
    through: Through | None = None,
) -> list[Tensor]:
    """`predict_velocity` of several pairs of any sizes: of B latents [1, C, H, W] at noise levels sigma [B]."""
    inputs = zip(latents, sigma_B.split(1), conditions, strict=True)
    return [predict_velocity(transformer, *each, through) for each in inputs]


def predict_velocity(
    transformer: QwenImageTransformer2DModel,
    latents_1CHW: Tensor,
    sigma_1: Tensor,
    condition: Condition,
    through: Through | None = None,
) -> Tensor:
    """Predict the velocity [1, C, H, W] (noise minus latents) of a pair at noise level sigma [1] in 0..1.

    Tokens are [target, reference 1, reference 2, ...], as in diffusers' edit pipelines; only the target's predictions
    are returned. Computes in the transformer's dtype, as at inference, and in the caller's grad mode. `through` is that
    of `predict_tokens`.
    """
    height, width = latents_1CHW.shape[-2:]
    tokens = pack(latents_1CHW)
    references = [pad_to_patches(reference) for reference in condition.reference_latents]
    shapes = [token_shape(latents) for latents in (latents_1CHW, *references)]
    dtype = transformer.proj_out.weight.dtype
    picture, prompt = torch.cat([tokens, *map(pack, references)], dim=1).to(dtype), condition.prompt_embeds.to(dtype)
    if torch.is_grad_enabled():  # so that all blocks are alike to the compiler and to recomputation
        picture, prompt = (each.detach().requires_grad_() for each in (picture, prompt))
    prediction = predict_tokens(transformer, picture, sigma_1.float(), prompt, None, shapes, through)
    return unpack(prediction, height, width)
