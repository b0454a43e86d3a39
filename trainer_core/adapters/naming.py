"""Names of tensors in LoRA files: which layer a tensor belongs to, and which part of its weight change it is."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping

from ..errors import ModelFileError
from ..text import shown

LOKR_PARTS = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b")
# What programs put before a layer's name: diffusers, ComfyUI, peft, DiffSynth-Studio, torch's data parallel. A file may
# have several of them, such as `base_model.model.transformer.` or `pipe.dit.`.
_WRAPPERS = ("base_model.model.", "model.", "transformer.", "diffusion_model.", "pipe.", "dit.", "module.")
_COMPILED = "_orig_mod."  # torch.compile's, before a layer's name or within it
# Followed by the layer's name with _ for each dot: kohya and musubi-tuner, LyCORIS, OneTrainer.
_FLAT_PREFIXES = ("lora_unet_", "lycoris_", "lora_transformer_")
# peft puts the adapter's name after lora_A, such as `lora_A.default.weight`. It never contains a dot.
_TENSOR = re.compile(
    r"(?P<stem>.+?)(?:"
    r"\.lora_(?P<factor>A|B|down|up)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.(?!weight$)[^.]+)?(?:\.weight)?"
    r"|(?:[._]lora|\.lora_linear_layer)\.(?P<old>down|up)\.weight"
    rf"|\.(?P<other>alpha|dora_scale|{'|'.join(LOKR_PARTS)})"
    r")",
    re.DOTALL,
)
_PART = {"A": "down", "B": "up", "lora_magnitude_vector": "magnitude"}
# Parts of names that only other networks have. They are looked for in this order, in names with _ for each dot.
_TEXT_ENCODER = re.compile(r"_lora_te\d?_|_text_encoder|text_model_encoder|_layers_\d+_self_attn_[qkvo]_proj")
_OTHER_MODELS = {
    "a text encoder": _TEXT_ENCODER,
    "Stable Diffusion or SDXL": re.compile("(down|up|input|output)_blocks_|mid_block_"),
    "FLUX or HunyuanVideo": re.compile("(double|single|single_transformer)_blocks_"),
    "Stable Diffusion 3": re.compile("joint_(transformer_)?blocks_"),
    "Wan": re.compile("_cross_attn_|condition_embedder_"),
    "Lumina or Z-Image": re.compile("(noise|context)_refiner_|_attention_qkv|_adaLN_modulation_"),
}
_SHOWN = 3


def sort_by_layer(names: Iterable[str], layers: Collection[str], file: str) -> dict[str, dict[str, str]]:
    """The name of each tensor, by its layer and its part: down, up, magnitude, alpha, dora_scale, or one of LoKr's.

    `layers` are full names of the network's layers. `file` is the file's name for messages.

    Raises:
        ModelFileError: a tensor is no part of a LoRA, DoRA or LoKr; the prefix of a layer's name is unknown; a layer is
            not among `layers`; two tensors are the same part of a layer.
    """
    flat = {layer.replace(".", "_"): layer for layer in layers}
    known = layers if isinstance(layers, (set, frozenset, dict)) else frozenset(layers)
    found: dict[str, dict[str, str]] = {}
    strange, unknown, twice = list[str](), list[str](), list[str]()
    for name in names:
        match = _TENSOR.fullmatch(name)
        layer = _layer_of(match["stem"], known, flat) if match else None
        if match is None:
            strange.append(name)
        elif layer is None:
            unknown.append(name)
        else:
            part = match["factor"] or match["magnitude"] or match["old"] or match["other"]
            kept = found.setdefault(layer, {}).setdefault(_PART.get(part, part), name)
            twice += [] if kept == name else [kept, name]
    if strange or unknown:
        count = len(strange) + len(unknown) + sum(map(len, found.values()))
        raise _foreign(strange, count, file) if strange else _unmatched(unknown, count, known, flat, file)
    if twice:
        raise ModelFileError(
            f"{file} has the same part of a layer more than once: {first(twice)}. It may hold several adapters. Save "
            "one of them to a file of its own and choose that."
        )
    return found


def _layer_of(stem: str, layers: Collection[str], flat: Mapping[str, str]) -> str | None:
    """The layer whose tensors' names begin with `stem`, if its prefix is known."""
    plain = stem.replace(_COMPILED, "")
    while plain not in layers:
        wrapper = next((each for each in _WRAPPERS if plain.startswith(each)), "")
        if not wrapper:
            break
        plain = plain.removeprefix(wrapper)
    if plain in layers:
        return plain
    prefix = next((each for each in _FLAT_PREFIXES if stem.startswith(each)), "")
    return flat.get(stem.removeprefix(prefix)) if prefix else None


def _unmatched(
    unknown: list[str], count: int, layers: Collection[str], flat: Mapping[str, str], file: str
) -> ModelFileError:
    """The error for names of layers that were not found: a text encoder's, another model's, or an unknown prefix."""
    plain = ["_" + name.replace(".", "_") for name in unknown]
    if len(unknown) < count and all(map(_TEXT_ENCODER.search, plain)):
        return ModelFileError(
            f"{file} also changes a text encoder: {_tensors(unknown, count)}, such as {first(unknown)}. Only the "
            "transformer's part can be used. Save it to a file without them and choose that."
        )
    model = next((model for model, marks in _OTHER_MODELS.items() if any(map(marks.search, plain))), "")
    if not model and all(_ends_in_a_layer(each, layers, flat) for each in unknown):
        return ModelFileError(
            f"{file} has an unknown naming: {_tensors(unknown, count)} name a layer of this model after a prefix that "
            f"isn't known, such as {first(unknown[:1])}. Rename them to begin with diffusion_model. in its place."
        )
    return ModelFileError(
        f"{_tensors(unknown, count)} in {file} belong to layers that this model doesn't have, such as "
        f"{first(unknown)}. The file was made for another model{f', probably {model}' if model else ''}. Choose a LoRA "
        "for Qwen-Image-Edit."
    )


def _ends_in_a_layer(name: str, layers: Collection[str], flat: Mapping[str, str]) -> bool:
    match = _TENSOR.fullmatch(name)
    stem = match["stem"].replace(_COMPILED, "") if match else ""
    end = stem[-max(map(len, layers), default=0) - 1 :]  # no layer has a longer name, and a name in a file may be huge
    starts = (at + 1 for at, letter in enumerate(end) if letter in "._")
    return any(end[start:] in layers or end[start:] in flat for start in starts)


def _foreign(strange: list[str], count: int, file: str) -> ModelFileError:
    return ModelFileError(
        f"{_tensors(strange, count)} in {file} are neither LoRA, DoRA nor LoKr, such as {first(strange)}. Choose "
        "another file; ComfyUI's own LoRA loader may support this one."
    )


def _tensors(some: list[str], count: int) -> str:
    return f"{len(some)} of the {count} tensors"


def first(names: list[str]) -> str:
    """The first names, for a message."""
    return ", ".join(map(shown, names[:_SHOWN]))
