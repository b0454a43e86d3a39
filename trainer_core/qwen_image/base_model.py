"""Facts about a base model, read from its files' headers and configurations without reading weights."""

from __future__ import annotations

import copy
import inspect
import logging
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import FlavourName, ModelConfig
from ..errors import ModelFileError
from ..packages import check_packages, explained_imports
from ..precision.materialise import check_weight_shapes
from ..text import brief
from ..weights.source import open_weights
from ..weights.stored import WeightSource
from .flavours import FLAVOURS, title_of, titles
from .folder import DEMO_FOLDER, ModelFolder, config_errors, model_folder, read_json, weights_digest
from .frozen_forward import optimise_frozen_forward
from .recognise import LAYERED_MARKS, QWEN_IMAGE, doubts_by_name, instead_of, looks_like, wrong_kind

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

# Prefixes that programs put before all weight names when they save a transformer to a single file.
TRANSFORMER_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.")
# Width of each rotary axis (frame, row, column) by attention head width. A single file doesn't store them.
ROPE_AXES = {128: (16, 56, 56)}
# Largest sizes that a configuration may have. With larger ones the empty network would take minutes to make.
_MOST = {
    "num_layers": 1_000,
    "num_attention_heads": 1_000,
    "attention_head_dim": 10_000,
    "joint_attention_dim": 100_000,
}
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk. Each fact is read once, when it is first needed.

    Create one per run and pass it on, so that planning, encoding, training and validation all use the same facts.

    Raises:
        PackageError: the installed packages don't fit.
    """

    config: ModelConfig

    def __post_init__(self) -> None:
        check_packages()  # every command and node that computes creates a BaseModel first

    @cached_property
    def folder(self) -> ModelFolder:
        """Paths of the model's parts.

        Raises:
            ModelFileError: a file or folder is missing.
        """
        return model_folder(self.config)

    @cached_property
    def network_settings(self) -> dict[str, Any]:
        """The arguments of the transformer's class, with the flavour's `zero_cond_t`.

        Raises:
            ModelFileError: not a Qwen-Image transformer, one of another flavour, or the precision is `file` and the
                weights are packed in a format that no layer can use directly.
        """
        place = self.folder.transformer
        _check_pipeline(place, self.config.flavour)
        settings = transformer_settings(place, self.config.flavour)
        _check_flavour(self.config, place, settings)
        if place.is_file() and (doubts := doubts_by_name(place.name)):
            _LOG.warning("%s", doubts)
        packing = self.transformer_weights.packing
        if self.config.base_model_precision == "file" and packing:
            raise ModelFileError(
                f"{place.name} stores its weights as {packing}, but base_model_precision 'file' supports only fp8 and "
                "int8. Set base_model_precision to nf4-bnb or int8-quanto."
            )
        return {**settings, "zero_cond_t": FLAVOURS[self.config.flavour].zero_cond_t}

    @property
    def transformer_weights(self) -> WeightSource:
        """The transformer's weights.

        Raises:
            ModelFileError: a file is missing, damaged, or in a format that can't be trained on.
        """
        return open_transformer(self.folder.transformer, self.config.flavour)

    @property
    def num_blocks(self) -> int:
        """The number of transformer blocks."""
        return int(self.network_settings["num_layers"])

    @property
    def prompt_width(self) -> int:
        """Width D of the prompt embeddings."""
        return int(self.network_settings.get("joint_attention_dim", 3584))

    @cached_property
    def vae_digest(self) -> str:
        """The `weights_digest` of the VAE."""
        return weights_digest(self.folder.vae)

    @cached_property
    def transformer_digest(self) -> str:
        """The `weights_digest` of the transformer."""
        return weights_digest(self.folder.transformer)

    @cached_property
    def bytes_per_weight(self) -> float:
        """Mean bytes per transformer weight in the model's files: 0.5 (NF4) to 4 (float32)."""
        place = self.folder.transformer
        files = [place] if place.is_file() else list(place.glob("*.safetensors"))
        return sum(path.stat().st_size for path in files) / self._empty[1]

    @property
    def network(self) -> QwenImageTransformer2DModel:
        """The transformer on the meta device, as it is trained. Don't change it; use `new_network` for that."""
        return self._empty[0]

    def new_network(self) -> QwenImageTransformer2DModel:
        """A copy of `network` to load weights into."""
        return copy.deepcopy(self.network)

    @cached_property
    def _empty(self) -> tuple[QwenImageTransformer2DModel, int]:
        """The network, and the number of weights in the file, counted before unused layers are removed."""
        settings, place = self.network_settings, self.folder.transformer
        with config_errors(place / "config.json" if place.is_dir() else place):
            network = empty_transformer(settings)
        count = sum(weight.numel() for weight in network.parameters())
        optimise_frozen_forward(network)
        check_weight_shapes(network, self.transformer_weights)
        return network, count


def open_transformer(place: Path, flavour: FlavourName) -> WeightSource:
    """The weights of a transformer in a file or folder.

    Raises:
        ModelFileError: as `open_weights`.
    """
    return open_weights(place, TRANSFORMER_PREFIXES, instead_of("transformer", flavour))


def transformer_settings(place: Path, flavour: FlavourName = "edit-v2") -> dict[str, Any]:
    """The network's configuration, from config.json or derived from a single file's shapes. Reads no weights.

    `zero_cond_t` is None if a single file has no marker: the marker proves a 2511, but its absence proves nothing.

    Raises:
        ModelFileError: not a Qwen-Image transformer.
    """
    instead = instead_of("transformer", flavour)
    if not place.is_dir():
        return _settings_of_file(open_transformer(place, flavour), instead)
    stored = read_json(place / "config.json")
    if stored.get("_class_name") != "QwenImageTransformer2DModel":
        raise ModelFileError(
            f"{place / 'config.json'} has the class {brief(stored.get('_class_name'))}, not "
            f"'QwenImageTransformer2DModel'. {instead}"
        )
    if stored.get("use_additional_t_cond") or stored.get("use_layer3d_rope"):
        raise _layered(place, instead)
    settings = {"num_layers": 60, "zero_cond_t": False, **stored}
    for name, most in _MOST.items():
        value = settings.get(name, 1)
        if not isinstance(value, int) or not 1 <= value <= most:
            raise ModelFileError(
                f"{name} in {place / 'config.json'} must be a whole number from 1 to {most:,}, got {brief(value)}. "
                "Download it again."
            )
    return settings


def _settings_of_file(source: WeightSource, instead: str) -> dict[str, Any]:
    shapes, name = source.shapes, source.place.name
    if any(mark in shapes or mark in source.markers for mark in LAYERED_MARKS):
        raise _layered(source.place, instead)
    first = "transformer_blocks.0.attn."
    marks = ("txt_norm.weight", "img_in.weight", "txt_in.weight", "proj_out.weight", f"{first}norm_added_k.weight")
    missing = [mark for mark in marks if mark not in shapes]
    if missing:
        if looks_like(shapes) == QWEN_IMAGE:
            raise ModelFileError(f"{name} is incomplete: it has no {missing[0]}. Download it again. {instead}")
        raise ModelFileError(f"{wrong_kind(name, QWEN_IMAGE, missing[0], shapes)} {instead}")
    if any(len(shapes[mark]) != (2 if mark.endswith(("in.weight", "out.weight")) else 1) for mark in marks):
        raise ModelFileError(f"{name} is not a Qwen-Image transformer: its weights have other shapes. {instead}")
    head = shapes[f"{first}norm_added_k.weight"][0]
    if head not in ROPE_AXES:
        raise ModelFileError(
            f"{name} is not a Qwen-Image transformer: its attention heads have width {head} instead of 128. {instead}"
        )
    found = (re.match(r"transformer_blocks\.(\d{1,4})\.", key) for key in shapes)
    return {
        "num_layers": max(int(match[1]) for match in found if match) + 1,
        "in_channels": shapes["img_in.weight"][1],
        "out_channels": shapes["proj_out.weight"][0] // 4,
        "attention_head_dim": head,
        "num_attention_heads": shapes["img_in.weight"][0] // head,
        "joint_attention_dim": shapes["txt_in.weight"][1],
        "axes_dims_rope": ROPE_AXES[head],
        "zero_cond_t": True if "__index_timestep_zero__" in source.markers else None,
    }


def _layered(place: Path, instead: str) -> ModelFileError:
    return ModelFileError(
        f"{place.name} is Qwen-Image-Layered, which makes layers of a picture and needs other inputs. {instead}"
    )


def empty_transformer(settings: dict[str, Any]) -> QwenImageTransformer2DModel:
    """The network on the meta device. The rotary table is real, because it is computed and not loaded."""
    with explained_imports("diffusers"):
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
    """Check that the transformer belongs to the chosen flavour.

    A 2511 has zero_cond_t; the others differ in the pipeline that their download names. A single file without the
    marker may be any flavour. For a folder without model_index.json, only zero_cond_t can be checked.

    Raises:
        ModelFileError: the transformer belongs to another flavour.
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
        f"{' or '.join(row.released_as.split('/')[1] for row in fitting)} ({found}), but the chosen release is "
        f"{title_of(config.flavour)}. Choose {titles(fitting)}."
    )


def _check_pipeline(place: Path, flavour: FlavourName) -> None:
    """Check that the download's model_index.json doesn't name a model other than the edit models.

    Raises:
        ModelFileError: it names one, such as the text-to-image model.
    """
    name = _pipeline_class(place)
    if name.startswith("QwenImage") and "Edit" not in name:
        what = "the text-to-image model Qwen-Image" if name == "QwenImagePipeline" else f"for {name}"
        raise ModelFileError(
            f"{place.parent} is {what}, as its model_index.json says, and not an edit model. "
            f"{instead_of('transformer', flavour)}"
        )


def _pipeline_of(place: Path) -> str:
    """The diffusers edit pipeline named in the download's model_index.json; empty if there is none."""
    name = _pipeline_class(place)
    return name if name in {row.pipeline for row in FLAVOURS.values()} else ""


def _pipeline_class(place: Path) -> str:
    index = place.parent / "model_index.json"
    return str(read_json(index).get("_class_name", "")) if place.is_dir() and index.is_file() else ""
