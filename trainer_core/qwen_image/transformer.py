"""The diffusion transformer: loading it frozen, and the forward that training and sampling share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..events import SILENT, Observer
from ..precision.materialise import Placement, materialise
from ..weights.stored import WeightSource
from .base_model import BaseModel, compute_dtype
from .frozen_forward import PairShape, Through, predict_tokens
from .latents import pack, pad_to_patches, token_shape, unpack
from .quantised_entry import quantised_entry
from .types import Condition

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Input and output layers that are never quantised: under 2 % of the weights, but they affect every token.
SENSITIVE_LAYERS = ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out")


def load_transformer(
    base: BaseModel,
    device: torch.device,
    observer: Observer = SILENT,
    *,
    on_host: Collection[int] = (),
    source: WeightSource | None = None,
) -> QwenImageTransformer2DModel:
    """Load a base model's transformer block by block onto `device`, frozen and in the configured precision.

    Blocks with numbers in `on_host` go to host memory. The network's forward is that of `optimise_frozen_forward`.
    `source`: the weights; None for those of the model's file.

    Raises:
        ModelFileError: the transformer is missing, damaged, another model, or of another flavour.
        MissingPackageError: the precision or the file format needs a package that is not installed.
        Interrupted: the observer wants to stop.
    """
    config = base.config
    network = base.new_network()  # first, because it raises for a wrong model before a large file is opened
    source = source or base.transformer_weights
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


def predict_velocity(
    transformer: QwenImageTransformer2DModel, latents_1CHW: Tensor, sigma_1: Tensor, condition: Condition
) -> Tensor:
    """`predict_velocities` of a single pair: [1, C, H, W] at noise level sigma [1]."""
    (velocity,) = predict_velocities(transformer, [latents_1CHW], sigma_1, [condition])
    return velocity


def predict_velocities(
    transformer: QwenImageTransformer2DModel,
    latents: Sequence[Tensor],
    sigma_B: Tensor,
    conditions: Sequence[Condition],
    through: Through | None = None,
) -> list[Tensor]:
    """Predict the velocities (noise minus latents) of B pairs of any sizes, at noise levels sigma [B] in 0..1.

    Latents and velocities are [1, C, H, W] each. A pair's picture tokens are [target, reference 1, reference 2, ...],
    as in diffusers' edit pipelines. All pairs' tokens stand side by side without padding, and no pair sees another.
    Computes in the transformer's dtype, as at inference, and in the caller's grad mode. `through` is that of
    `predict_tokens`.
    """
    pictures = [
        [target, *map(pad_to_patches, condition.reference_latents)]
        for target, condition in zip(latents, conditions, strict=True)
    ]
    dtype = transformer.proj_out.weight.dtype
    picture = torch.cat([pack(each) for pair in pictures for each in pair], dim=1).to(dtype)
    prompt = torch.cat([condition.prompt_embeds for condition in conditions], dim=1).to(dtype)
    if torch.is_grad_enabled():  # so that all blocks are alike to the compiler and to recomputation
        picture, prompt = (each.detach().requires_grad_() for each in (picture, prompt))
    shapes = tuple(
        PairShape(condition.prompt_embeds.shape[1], tuple(map(token_shape, pair)))
        for condition, pair in zip(conditions, pictures, strict=True)
    )
    predicted = predict_tokens(transformer, picture, sigma_B.float(), prompt, shapes, through)
    of_pairs = predicted.split([shape.target for shape in shapes], dim=1)
    return [unpack(tokens, *each.shape[-2:]) for tokens, each in zip(of_pairs, latents, strict=True)]
