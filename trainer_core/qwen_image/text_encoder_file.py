"""Loads Qwen2.5-VL layer by layer, from a ComfyUI file (bf16, fp8 or scaled fp8) or from a folder."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..config import ModelConfig
from ..errors import ModelFileError
from ..events import Observer
from ..packages import explained_imports
from ..precision.materialise import Placement, check_weight_shapes, materialise
from ..weights.source import open_weights
from ..weights.stored import Read, WeightSource
from .folder import config_errors, read_json
from .quantised_entry import quantised_entry
from .recognise import instead_of, wrong_kind

if TYPE_CHECKING:
    from transformers import Qwen2_5_VLForConditionalGeneration

LANGUAGE_HEAD = "lm_head.weight"
KEPT_LAYERS = ("lm_head", "model.visual.merger.*")  # the merger connects vision and language; 1 % of the weights
LAYERS, TOKEN_EMBEDDINGS = "model.language_model.layers", "model.language_model.embed_tokens"
_MARK = "model.layers.0.self_attn.k_proj.bias"
# Prefixes that ComfyUI's and other programs' files put before all weight names.
_FILE_PREFIXES = ("text_encoders.qwen25_7b.transformer.", "qwen25_7b.transformer.", "text_encoder.")


def qwen25_vl_7b() -> dict[str, Any]:
    """The configuration of Qwen2.5-VL-7B-Instruct, Qwen-Image's text encoder. A single file doesn't contain it."""
    return {
        "image_token_id": 151655,
        "video_token_id": 151656,
        "vision_start_token_id": 151652,
        "vision_end_token_id": 151653,
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "qwen2_5_vl_text",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1000000.0,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "model_type": "qwen2_5_vl",
            "depth": 32,
            "hidden_size": 1280,
            "intermediate_size": 3420,
            "num_heads": 16,
            "in_channels": 3,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "tokens_per_second": 2,
            "window_size": 112,
            "out_hidden_size": 3584,
            "fullatt_block_indexes": [7, 15, 23, 31],
        },
    }


def load_by_layers(
    config: ModelConfig,
    place: Path,
    dtype: torch.dtype,
    device: torch.device,
    observer: Observer,
    on_host: Collection[int] = (),
    *,
    with_head: bool = False,
) -> Qwen2_5_VLForConditionalGeneration:
    """Load the network layer by layer onto `device`, in its precision. Only writing text needs the language head.

    The token embeddings stay in host memory, because a prompt needs only few of their rows. So do the language model's
    layers with numbers in `on_host`.

    Raises:
        ModelFileError: not a Qwen2.5-VL, a single file that is not the 7B model, or the head is needed and missing.
        MissingPackageError: the precision or file format needs a package that is not installed.
        Interrupted: the observer wants to stop.
    """
    network, source = _empty(place, with_head=with_head)
    quantise_on = torch.device("cpu") if config.quantize_via == "cpu" else device
    placement = Placement(
        precision=config.text_encoder_precision,
        dtype=dtype,
        device=device,
        quantise_on=quantise_on,
        keep=KEPT_LAYERS,
        on_host=(TOKEN_EMBEDDINGS, *(f"{LAYERS}.{number}." for number in on_host)),
    )
    materialise(
        network, source, placement, "Loading the text encoder", observer, quantised_entry(config, source, placement)
    )
    _restore_rotary(network, device)
    return network


def _empty(place: Path, *, with_head: bool) -> tuple[Qwen2_5_VLForConditionalGeneration, WeightSource]:
    """The network on the meta device, and its weights, which are complete.

    Raises:
        ModelFileError: as `load_by_layers`.
    """
    with explained_imports("transformers"):
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    source, config = _open(place), place / "config.json"
    settings = qwen25_vl_7b() if place.is_file() else dict(read_json(config))
    with config_errors(config), torch.device("meta"):
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    if with_head:
        _check_head(network, source)
    else:
        network.lm_head = nn.Identity()
    check_weight_shapes(network, source)
    return network, source


def _check_head(network: Any, source: WeightSource) -> None:
    """Check that the file has a language head, with which the network writes text."""
    if LANGUAGE_HEAD in source.shapes:
        return
    why = "Prompts can be encoded without it."
    if network.config.tie_word_embeddings:
        why = "tie_word_embeddings in its config.json is true, which Qwen-Image's text encoder never has."
    raise ModelFileError(
        f"{source.place.name} can't write captions, because it has no language head, {LANGUAGE_HEAD}. {why} "
        f"{instead_of('text_encoder')}"
    )


def stored_shapes(place: Path, *, with_head: bool = False) -> dict[str, tuple[int, ...]]:
    """Shapes of the weights that `load_by_layers` loads, by transformers' names. Reads headers only.

    Raises:
        ModelFileError: not a Qwen2.5-VL.
    """
    shapes = {name: tuple(shape) for name, shape in _open(place).shapes.items()}
    return {name: shape for name, shape in shapes.items() if with_head or not name.startswith("lm_head")}


def check_text_encoder_file(place: Path, *, with_head: bool = False) -> None:
    """Check by the files' headers that this is a whole Qwen2.5-VL, and that a single file is the 7B model.

    Raises:
        ModelFileError: it is not, or the head is needed and missing.
    """
    _empty(place, with_head=with_head)


def _open(place: Path) -> _Renamed:
    instead = instead_of("text_encoder")
    if place.suffix == ".gguf":
        raise ModelFileError(f"{place.name} is a GGUF file, which the text encoder can't be read from. {instead}")
    source = _Renamed(open_weights(place, _FILE_PREFIXES, instead))
    if _in_transformers(_MARK) not in source.shapes:
        raise ModelFileError(f"{wrong_kind(place.name, 'a Qwen2.5-VL', _MARK, source.shapes)} {instead}")
    if place.is_file():
        _check_7b(source, instead)
    return source


def _check_7b(source: _Renamed, instead: str) -> None:
    """Check that a file has the layers and the width of the 7B model."""
    text, vision = (qwen25_vl_7b()[part] for part in ("text_config", "vision_config"))
    width = source.shapes[_in_transformers(_MARK)]
    wanted = (text["hidden_size"] // text["num_attention_heads"] * text["num_key_value_heads"],)
    if width != wanted:
        raise ModelFileError(
            f"{source.place.name} is a Qwen2.5-VL of another size than 7B: {_MARK} has shape {list(width)} instead of "
            f"{list(wanted)}. {instead}"
        )
    layers = [f"{LAYERS}.{number}.self_attn.k_proj.weight" for number in range(text["num_hidden_layers"])]
    blocks = [f"model.visual.blocks.{number}.attn.qkv.weight" for number in range(vision["depth"])]
    if missing := [name for name in (*layers, *blocks) if name not in source.shapes]:
        what = "has no vision tower" if set(missing) >= set(blocks) else "is incomplete"
        raise ModelFileError(f"{source.place.name} {what}: it lacks {missing[-1]}. {instead}")


def _in_transformers(name: str) -> str:
    """A file's weight name as transformers 5 has it, where `visual.*` and the language model moved below `model.`."""
    if name.startswith("visual."):
        return f"model.{name}"
    if name.startswith("model.") and not name.startswith(("model.visual.", "model.language_model.")):
        return "model.language_model." + name.removeprefix("model.")
    return name


class _Renamed:
    """A WeightSource with transformers' weight names."""

    def __init__(self, source: WeightSource) -> None:
        self._source = source
        self._stored = {_in_transformers(name): name for name in source.shapes}
        self.place, self.markers, self.packing = source.place, source.markers, source.packing
        self.shapes = {name: source.shapes[stored] for name, stored in self._stored.items()}

    @property
    def is_rotated(self) -> bool:
        return self._source.is_rotated

    def opened(self) -> AbstractContextManager[Read]:
        return self._opened()

    @contextmanager
    def _opened(self) -> Iterator[Read]:
        with self._source.opened() as read:
            yield lambda name: read(self._stored[name])


def _restore_rotary(network: Any, device: torch.device) -> None:
    """Compute the rotary frequencies: no file has them, and the meta device left them without values."""
    vision = network.config.vision_config
    for module in network.modules():
        names = [name for name, _ in module.named_buffers(recurse=False)]
        # The buffers of modules with weights belong to quantised weights and are loaded.
        has_weights = next(module.parameters(recurse=False), None) is not None
        if names and not has_weights:
            # In transformers 4, the vision rotary embedding takes half the head width instead of a config.
            argument = module.config if hasattr(module, "config") else vision.hidden_size // vision.num_heads // 2
            fresh = type(module)(argument)
            for name in names:
                setattr(module, name, getattr(fresh, name).to(device))
