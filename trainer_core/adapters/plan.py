"""Plans the adapter: which layers get one, their ranks, scales and start weights. Changes no network."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from ..config import LoraConfig, LoraTargets
from ..config.layer_patterns import layer_patterns
from ..errors import ConfigError, ModelFileError
from ..packages import explained_imports
from ..text import brief
from .reader import AdapterPart, Kronecker, LowRank, read_adapter

_ATTENTION_IMAGE = r"attn\.(to_q|to_k|to_v|to_out\.0)"
_ATTENTION = r"attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_MLP = r"(img_mlp|txt_mlp)\.net\.(0\.proj|2)"
_MODULATION = r"(img_mod|txt_mod)\.1"

TARGET_PATTERNS: dict[LoraTargets, str] = {
    "image-attention": rf"transformer_blocks\.\d+\.{_ATTENTION_IMAGE}",
    "attention": rf"transformer_blocks\.\d+\.{_ATTENTION}",
    "attention-mlp": rf"transformer_blocks\.\d+\.({_ATTENTION}|{_MLP})",
    "all": rf"transformer_blocks\.\d+\.({_ATTENTION}|{_MLP}|{_MODULATION})",
}
# Only the image stream of the last block is used afterwards, so these layers of that block get no gradient.
_WITHOUT_GRADIENT = re.compile(r"attn\.(to_add_out|add_q_proj)|txt_mlp\..*")


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's adapter. `start` is its initial weight change from `init_lora`, if any."""

    in_features: int
    out_features: int
    rank: int
    scale: float
    start: AdapterPart | None = None


def target_modules(transformer: nn.Module, lora: LoraConfig) -> list[str]:
    """Full names of the layers that get an adapter.

    Raises:
        ConfigError: the pattern matches no linear layer.
    """
    pattern = TARGET_PATTERNS.get(lora.lora_targets, lora.lora_target_pattern)
    names = linear_layers(transformer)
    chosen = [name for name in names if re.fullmatch(pattern, name) and not _is_dead_end(transformer, name)]
    if not chosen:
        raise ConfigError(f"lora_target_pattern {brief(pattern)} matches no layer. Layers are named like {names[2]!r}.")
    return chosen


def linear_layers(transformer: nn.Module) -> list[str]:
    """Full names of the model's linear layers, in the network's order.

    Layers that `optimise_frozen_forward` may have removed follow at the end: LoRA files may still contain them.
    """
    found = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    return found + [name for name in _unread_layers(transformer) if name not in found]


def _unread_layers(transformer: nn.Module) -> list[str]:
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."  # type: ignore[arg-type]
    return [f"{last}{part}" for part in ("attn.to_add_out", "txt_mlp.net.0.proj", "txt_mlp.net.2")]


def read_parts(transformer: nn.Module, path: Path) -> dict[str, AdapterPart]:
    """A LoRA file's weight changes by layer, without those of layers that don't affect the output.

    Raises:
        ModelFileError: the file is damaged, belongs to another model, or has an unsupported type.
    """
    parts = read_adapter(path, linear_layers(transformer))
    parts = {name: part for name, part in parts.items() if name not in _unread_layers(transformer)}
    _check_adapter_shapes(transformer, parts, path.name)
    return parts


def _is_dead_end(transformer: nn.Module, name: str) -> bool:
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}."  # type: ignore[arg-type]
    return name.startswith(last) and _WITHOUT_GRADIENT.fullmatch(name.removeprefix(last)) is not None


@dataclass(frozen=True, slots=True)
class AdapterPlan:
    """The plan of the whole adapter. `layers` is keyed by the layers' full names."""

    config: LoraConfig
    layers: Mapping[str, LayerPlan]

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of all trained tensors."""
        return tuple(shape for layer in self.layers.values() for shape in self._shapes_of(layer))

    def _shapes_of(self, layer: LayerPlan) -> Iterable[tuple[int, ...]]:
        if self.config.lora_type == "lokr":
            return lokr_shapes(layer, self.config.lokr_factor).values()
        matrices = ((layer.rank, layer.in_features), (layer.out_features, layer.rank))
        return (*matrices, (layer.out_features,)) if self.config.lora_type == "dora" else matrices


def plan_adapter(transformer: nn.Module, lora: LoraConfig) -> AdapterPlan:
    """Plan the adapter of a transformer, which may be on the meta device.

    Raises:
        ConfigError: a pattern matches no layer, or `init_lora` does not fit these settings.
        ModelFileError: `init_lora` can't be read, or belongs to another model.
    """
    names = target_modules(transformer, lora)
    for setting, lines in (("rank_pattern", lora.rank_pattern), ("alpha_pattern", lora.alpha_pattern)):
        for pattern in layer_patterns(setting, lines):
            if not any(map(pattern.matches, names)):
                raise ConfigError(
                    f"{setting} {brief(pattern.line)} matches none of the {len(names)} layers that get an adapter. Use "
                    f"a pattern for names like {names[0]!r}."
                )
    starts = _starts(transformer, lora, names)
    layers: dict[str, LayerPlan] = {}
    for name in names:
        layer, start = transformer.get_submodule(name), starts.get(name)
        rank = start.down.shape[0] if isinstance(start, LowRank) else lora.rank_of(name)
        layers[name] = LayerPlan(layer.in_features, layer.out_features, rank, lora.scale_of(name, rank), start)  # type: ignore[arg-type]
    return AdapterPlan(lora, layers)


def _starts(transformer: nn.Module, lora: LoraConfig, names: list[str]) -> Mapping[str, AdapterPart]:
    """The initial weight changes from `init_lora`, by layer."""
    if not lora.init_lora:
        return {}
    path = Path(lora.init_lora)
    parts = read_parts(transformer, path)
    kinds = {part.kind for part in parts.values()}
    if not kinds <= {"lora": {"lora"}, "dora": {"lora", "dora"}, "lokr": {"lokr"}}[lora.lora_type]:
        raise ConfigError(
            f"init_lora {path.name} has the type {' and '.join(sorted(kinds))}, but lora_type is {lora.lora_type}. "
            f"Set lora_type to {'dora' if 'dora' in kinds else kinds.pop()}, or choose another file."
        )
    left = [name for name in parts if name not in names and not _is_dead_end(transformer, name)]
    if left:
        raise ConfigError(
            f"init_lora {path.name} changes {len(left)} layers that these settings don't train, such as {left[0]}. "
            "Choose lora_targets that include them, or another file."
        )
    return parts


def _check_adapter_shapes(transformer: nn.Module, parts: Mapping[str, AdapterPart], file: str) -> None:
    """Check that a file's weight changes have the shapes of the layers' weights.

    Raises:
        ModelFileError: one has another shape.
    """
    for name, part in parts.items():
        layer = transformer.get_submodule(name)
        wanted = (layer.out_features, layer.in_features)
        if part.shape != wanted:
            raise ModelFileError(
                f"{file} changes {name} by a matrix of {list(part.shape)}, but the model's is {list(wanted)}. It was "  # type: ignore[arg-type]
                "trained for another model; choose another file."
            )


def lokr_shapes(layer: LayerPlan, factor: int) -> dict[str, tuple[int, int]]:
    """Shapes of a LoKr's parameters for one layer: those of its start file, or the ones that peft chooses."""
    with explained_imports("peft"):
        from peft.tuners.lokr.layer import factorization

    if isinstance(layer.start, Kronecker):
        matrices = [layer.start.first, *layer.start.second]
        shapes = [(matrix.shape[0], matrix.shape[1]) for matrix in matrices]
    else:
        (c, d), (a, b) = factorization(layer.in_features, factor), factorization(layer.out_features, factor)
        shapes = [(a, c), *([(b, layer.rank), (layer.rank, d)] if layer.rank < max(b, d) / 2 else [(b, d)])]
    names = ["lokr_w1", "lokr_w2"] if len(shapes) == 2 else ["lokr_w1", "lokr_w2_a", "lokr_w2_b"]
    return dict(zip(names, shapes, strict=True))
