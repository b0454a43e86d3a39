"""The diffusion transformer: loaded frozen, and the one forward that training and sampling share."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..events import SILENT, Observer
from ..precision.materialise import Placement, materialise
from ..weights.source import open_weights
from .base_model import TRANSFORMER_PREFIXES, BaseModel, compute_dtype
from .latents import pack, pad_to_patches, token_shape, unpack
from .quantised_entry import quantised_entry
from .types import Condition

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Layers at the network's borders: under 2 % of the weights, and every token passes through them.
SENSITIVE_LAYERS = ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out")


def load_transformer(
    base: BaseModel, device: torch.device, observer: Observer = SILENT, *, on_host: Collection[int] = ()
) -> QwenImageTransformer2DModel:
    """The frozen transformer of a base model on `device`, in the wanted precision, read block by block.

    Blocks whose numbers are in `on_host` end in host memory. The forward is that of `optimise_frozen_forward`.

    Raises:
        ModelFileError: no such transformer, a damaged one, or one of another flavour.
        MissingPackageError: the precision or the file's format needs one.
        Interrupted: the observer wants to stop.
    """
    config = base.config
    network = base.new_network()  # raises before a large file is opened
    source = open_weights(base.folder.transformer, TRANSFORMER_PREFIXES)
    placement = Placement(
        precision=config.base_model_precision,
        dtype=compute_dtype(config),
        device=device,
        quantise_on=torch.device("cpu") if config.quantize_via == "cpu" else device,
        keep=SENSITIVE_LAYERS,
        on_host=tuple(f"transformer_blocks.{number}." for number in on_host),
        quantise_inputs=config.quantize_activations,
    )
    cache = quantised_entry(config, source.place, placement)
    materialise(network, source, placement, "Loading the transformer", observer, cache)
    return network


def predict_velocity(
    transformer: QwenImageTransformer2DModel, latents_BCHW: Tensor, sigma_B: Tensor, condition: Condition
) -> Tensor:
    """Velocity [B, C, H, W] (noise minus latents) at noise level sigma in [0, 1].

    Tokens are [target, reference 1, reference 2, ...], as in the edit pipelines of diffusers; the prediction is cut
    to the target. Computes in the transformer's own dtype, as at inference, and in the caller's grad mode.
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
