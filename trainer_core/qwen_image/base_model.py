"""What a base model's files say of it, read from headers and configurations before any weight."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import ModelConfig
from ..errors import ModelFileError
from ..weights.source import open_weights
from ..weights.stored import WeightSource
from .flavours import FLAVOURS
from .folder import DEMO_FOLDER, ModelFolder, model_folder, read_json, weights_digest
from .frozen_forward import optimise_frozen_forward

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Prefixes that programs put before all names of a transformer in a single file.
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# Rotary axes (frame, row, column) by the width of a head; no file stores them.
ROPE_AXES = {128: (16, 56, 56)}


@dataclass(frozen=True)
class BaseModel:
    """One base model on disk. Each fact is read when it is first needed, and only once.

    Make one per run and hand it on: planning, encoding, training and validation then agree on what they read.
    """

    config: ModelConfig

    @cached_property
    def folder(self) -> ModelFolder:
        """Where the parts lie.

        Raises:
            ModelFileError: a file or folder is missing.
        """
        return model_folder(self.config)

    @cached_property
    def network_settings(self) -> dict[str, Any]:
        """The transformer's `transformer_settings`, with the `zero_cond_t` of the flavour.

        Raises:
            ModelFileError: no such transformer, one of another flavour, or one whose codes `file` can't keep.
        """
        place = self.folder.transformer
        settings = transformer_settings(place)
        _check_flavour(self.config, place, settings)
        if self.config.base_model_precision == "file" and (
            packing := open_weights(place, TRANSFORMER_PREFIXES).packing
        ):
            raise ModelFileError(
                f"{place.name} stores its weights as {packing}, which base_model_precision 'file' can't keep; it keeps "
                "fp8 and int8. Set base_model_precision to nf4-bnb or int8-quanto."
            )
        return {**settings, "zero_cond_t": FLAVOURS[self.config.flavour].zero_cond_t}

    @property
    def num_blocks(self) -> int:
        """The transformer's depth."""
        return int(self.network_settings["num_layers"])

    @property
    def prompt_width(self) -> int:
        """Width D of the prompt embeddings."""
        return int(self.network_settings.get("joint_attention_dim", 3584))

    @cached_property
    def vae_digest(self) -> str:
        """A short name for the VAE's weights."""
        return weights_digest(self.folder.vae)

    @cached_property
    def bytes_per_weight(self) -> float:
        """Mean bytes of a transformer weight in its files, 0.5 to 4."""
        place = self.folder.transformer
        files = [place] if place.is_file() else list(place.glob("*.safetensors"))
        return sum(path.stat().st_size for path in files) / self._empty[1]

    @property
    def network(self) -> QwenImageTransformer2DModel:
        """The transformer as it is trained through, on the meta device. Read it only; `new_network` is for filling."""
        return self._empty[0]

    def new_network(self) -> QwenImageTransformer2DModel:
        """A copy of `network` to fill with weights."""
        return copy.deepcopy(self.network)

    @cached_property
    def _empty(self) -> tuple[QwenImageTransformer2DModel, int]:
        """The network, and its number of weights before what nobody reads was left out, as the file has them."""
        network = empty_transformer(self.network_settings)
        count = sum(weight.numel() for weight in network.parameters())
        optimise_frozen_forward(network)
        return network, count


def transformer_settings(place: Path) -> dict[str, Any]:
    """The network's configuration, from config.json or from the shapes in a single file. Reads no weights.

    `zero_cond_t` is None where the file does not tell: only a marker says that it is a 2511.

    Raises:
        ModelFileError: not a Qwen-Image transformer.
    """
    if not place.is_dir():
        return _settings_of_file(open_weights(place, TRANSFORMER_PREFIXES))
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
