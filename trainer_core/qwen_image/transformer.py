"""The diffusion transformer: loaded frozen, and the one forward that training and sampling share."""

from __future__ import annotations

import inspect
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import ModelConfig
from ..errors import ModelFileError
from ..events import SILENT, Observer
from ..precision.materialise import Placement, materialise
from ..weights.source import open_weights
from ..weights.stored import WeightSource
from .flavours import FLAVOURS
from .folder import DEMO_FOLDER, model_folder, read_json
from .kept_weights import kept_weights
from .latents import pack, pad_to_patches, token_shape, unpack
from .lighten import lighten
from .types import Condition

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Layers at the network's borders: under 2 % of the weights, and every token passes through them.
SENSITIVE_LAYERS = ("img_in", "txt_in", "time_text_embed.*", "norm_out.*", "proj_out")
# What programs put before all names of a transformer in a single file.
PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# Rotary axes (frame, row, column) by the heads' width; nothing in a file tells them.
ROPE_AXES = {128: (16, 56, 56)}


def load_transformer(
    config: ModelConfig, device: torch.device, observer: Observer = SILENT, *, on_host: Collection[int] = ()
) -> QwenImageTransformer2DModel:
    """The frozen transformer of a base model on `device`, in the wanted precision, read block by block.

    Blocks whose numbers are in `on_host` end in host memory. What training can do without is left out: `lighten`.

    Raises:
        ModelFileError: no such transformer, a damaged one, or one of another flavour.
        MissingPackageError: the precision or the file's format needs one.
        Interrupted: the observer wants to stop.
    """
    settings = check_transformer(config)
    source = open_weights(model_folder(config).transformer, PREFIXES)
    network = empty_transformer(settings)
    _set_zero_cond_t(network, FLAVOURS[config.flavour].zero_cond_t)
    lighten(network)
    placement = Placement(
        precision=config.base_model_precision,
        dtype=compute_dtype(config),
        device=device,
        quantise_on=torch.device("cpu") if config.quantize_via == "cpu" else device,
        keep=SENSITIVE_LAYERS,
        on_host=tuple(f"transformer_blocks.{number}." for number in on_host),
        quantise_inputs=config.quantize_activations,
    )
    cache = kept_weights(config, source.place, placement)
    materialise(network, source, placement, "Loading the transformer", observer, cache)
    return network


def check_transformer(config: ModelConfig) -> dict[str, Any]:
    """See whether the transformer can be loaded as wished, from its header alone; its `transformer_settings`.

    Raises:
        ModelFileError: no such transformer, one of another flavour, or one that has no codes of its own to keep.
    """
    place = model_folder(config).transformer
    settings = transformer_settings(place)
    _check_flavour(config, place, settings)
    if config.base_model_precision == "file" and (packing := open_weights(place, PREFIXES).packing):
        raise ModelFileError(
            f"base_model_precision is 'file', and {place.name} holds its weights as {packing}, which is not kept as it "
            "is; allowed is 'file' for fp8 and int8. Set base_model_precision to nf4-bnb or int8-quanto."
        )
    return settings


def transformer_settings(place: Path) -> dict[str, Any]:
    """The network's configuration, from config.json or from the shapes in a single file. Reads no weights.

    `zero_cond_t` is None where the file does not tell: only a marker says that it is a 2511.

    Raises:
        ModelFileError: not a Qwen-Image transformer.
    """
    if not place.is_dir():
        return _settings_of_file(open_weights(place, PREFIXES))
    stored = read_json(place / "config.json")
    if stored.get("_class_name") != "QwenImageTransformer2DModel":
        raise ModelFileError(
            f"{str(place)!r} holds a {stored.get('_class_name')}, not a QwenImageTransformer2DModel. "
            "Choose a Qwen-Image-Edit download."
        )
    return {"zero_cond_t": False, **stored}


def _settings_of_file(source: WeightSource) -> dict[str, Any]:
    shapes, name = source.shapes, source.place.name
    first = "transformer_blocks.0.attn."
    marks = ("txt_norm.weight", "img_in.weight", "txt_in.weight", "proj_out.weight", f"{first}norm_added_k.weight")
    missing = [mark for mark in marks if mark not in shapes]
    if missing:
        raise ModelFileError(
            f"{name} is no Qwen-Image transformer: it has no {missing[0]}{_looks_like(shapes)}. Choose a "
            "Qwen-Image-Edit file from models/diffusion_models."
        )
    head = shapes[f"{first}norm_added_k.weight"][0]
    if head not in ROPE_AXES:
        raise ModelFileError(f"{name} has attention heads of width {head}; Qwen-Image's have 128. It is another model.")
    numbers = {int(key.split(".")[1]) for key in shapes if key.startswith("transformer_blocks.")}
    return {
        "num_layers": max(numbers) + 1,
        "in_channels": shapes["img_in.weight"][1],
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "attention_head_dim": head,
        "num_attention_heads": shapes["img_in.weight"][0] // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": ROPE_AXES[head],
        "zero_cond_t": True if "__index_timestep_zero__" in source.markers else None,
    }


def _looks_like(names: Collection[str]) -> str:
    """What a wrong file seems to be, as the rest of a sentence."""
    if any("lora" in name for name in names):
        return "; it looks like a LoRA"
    if any("self_attn.k_proj" in name for name in names):
        return "; it looks like a text encoder"
    if any(name.startswith(("decoder.", "encoder.")) for name in names):
        return "; it looks like a VAE"
    return ""


def empty_transformer(settings: dict[str, Any]) -> QwenImageTransformer2DModel:
    """The network on the meta device, without weights; what it computes at build time has its values."""
    from diffusers import QwenImageTransformer2DModel

    known = inspect.signature(QwenImageTransformer2DModel.__init__).parameters
    chosen = {key: value for key, value in settings.items() if key in known}
    with torch.device("meta"):
        network = QwenImageTransformer2DModel(**chosen)
    axes = list(network.config.axes_dims_rope)
    network.pos_embed = type(network.pos_embed)(theta=10000, axes_dim=axes, scale_rope=True)
    return network


def compute_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype of unquantised weights and of matrix products."""
    return torch.bfloat16 if config.mixed_precision == "bf16" else torch.float32


def _check_flavour(config: ModelConfig, place: Path, settings: dict[str, Any]) -> None:
    """A 2511 by its zero_cond_t, and the others by the pipeline that the download is made for.

    A single file without the marker may be any flavour, and a folder without model_index.json is asked for its
    zero_cond_t alone.
    """
    is_2511 = settings["zero_cond_t"]
    if place.is_relative_to(DEMO_FOLDER) or is_2511 is None:
        return
    pipeline = _pipeline_of(place)
    alike = [row for row in FLAVOURS.values() if row.zero_cond_t == bool(is_2511)]
    fitting = [row for row in alike if row.pipeline == pipeline] or alike
    if config.flavour in [row.name for row in fitting]:
        return
    found = f"zero_cond_t is {bool(is_2511)}" + (f", model_index.json says {pipeline}" if pipeline else "")
    raise ModelFileError(
        f"{place.name if place.is_file() else config.base!r} is a "
        f"{' or '.join(row.released_as.split('/')[1] for row in fitting)} ({found}), but the flavour is "
        f"{config.flavour}. Choose {' or '.join(row.name for row in fitting)}."
    )


def _pipeline_of(place: Path) -> str:
    """diffusers' pipeline that a transformer's folder belongs to, of those that edit; empty where nothing tells."""
    index = place.parent / "model_index.json"
    name = read_json(index).get("_class_name") if place.is_dir() and index.is_file() else ""
    return str(name) if name in {row.pipeline for row in FLAVOURS.values()} else ""


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
