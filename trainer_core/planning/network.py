"""The transformer in numbers: weights of a block and of the rest, in a precision, and those of its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..adapters.plan import num_parameters, target_modules
from ..config import BaseModelPrecision, LoraConfig, ModelConfig
from ..qwen_image.flavours import FLAVOURS
from ..qwen_image.folder import model_folder
from ..qwen_image.lighten import lighten
from ..qwen_image.transformer import check_transformer, compute_dtype, empty_transformer

_BLOCK = re.compile(r"transformer_blocks\.\d+\.(.+)")
_GROUP = 128  # weights that share a scale and a shift in quanto's int4 and int2
_NF4_BLOCK, _NF4_SCALES = 64, 256  # weights that share an 8-bit scale; scales that share a float32 one
_NF4_TABLES = 4 * (16 + 256 + 1)  # of codes and of scales, and their offset


@dataclass(frozen=True, slots=True)
class Weights:
    """Of a part of the network: shapes of the matrices that a precision changes, and the number of other weights."""

    matrices: tuple[tuple[int, int], ...]
    others: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSize:
    """`border`: what lies outside the blocks. `adapted`: layers with an adapter, as they are called within a block,
    each with its inputs; `adapter_weights` counts those of all blocks. `stored_bytes`: of a weight in precision
    `file`."""

    num_blocks: int
    width: int
    heads: int
    latent_channels: int
    prompt_width: int
    block: Weights
    last_block: Weights
    border: Weights
    precision: BaseModelPrecision
    element_bytes: int
    stored_bytes: float
    adapted: Mapping[str, int]
    adapter_weights: int
    is_modulated_per_token: bool

    @property
    def block_bytes(self) -> int:
        """Frozen weights of a block."""
        return self._bytes(self.block)

    @property
    def weight_bytes(self) -> int:
        """All frozen weights. Those outside the blocks are never quantised."""
        rows, columns = zip(*self.border.matrices, strict=True)
        border = self.border.others + sum(row * column for row, column in zip(rows, columns, strict=True))
        blocks = (self.num_blocks - 1) * self.block_bytes + self._bytes(self.last_block)
        return blocks + border * self.element_bytes

    @property
    def largest_layer_weights(self) -> int:
        """Weights of the largest layer of a block."""
        return max(rows * columns for rows, columns in self.block.matrices)

    def _bytes(self, weights: Weights) -> int:
        return stored_bytes(weights, self.precision, self.element_bytes, in_file=self.stored_bytes)


def stored_bytes(weights: Weights, precision: BaseModelPrecision, element_bytes: int, *, in_file: float) -> int:
    """Bytes of weights in a precision, scales included. `in_file`: bytes of one in their file, for precision `file`."""
    matrices = sum(_matrix_bytes(*shape, precision, element_bytes, in_file) for shape in weights.matrices)
    return round(matrices + weights.others * element_bytes)


def _matrix_bytes(rows: int, columns: int, precision: BaseModelPrecision, element_bytes: int, in_file: float) -> float:
    weights = rows * columns
    if precision == "none":
        return weights * element_bytes
    if precision == "file":  # codes of a byte are kept; weights of two bytes or more come in the arithmetic's type
        return weights * (1 + (element_bytes - 1) * min(1.0, max(0.0, in_file - 1)))
    if precision in ("int8-quanto", "fp8-quanto"):
        return weights + 4 * rows
    if precision == "nf4-bnb":
        scales = -(-weights // _NF4_BLOCK)
        return weights / 2 + scales + 4 * -(-scales // _NF4_SCALES) + _NF4_TABLES
    bits = 4 if precision == "int4-quanto" else 2
    return weights * bits / 8 + 2 * element_bytes * weights / _GROUP


def network_size(model: ModelConfig, lora: LoraConfig) -> NetworkSize:
    """Read off a base model's configuration or header; no weight is read.

    Raises:
        ModelFileError: no such transformer.
        ConfigError: lora_target_pattern matches nothing.
    """
    place = model_folder(model).transformer
    files = [place] if place.is_file() else list(place.glob("*.safetensors"))
    settings = {**check_transformer(model), "zero_cond_t": FLAVOURS[model.flavour].zero_cond_t}
    return measure_network(settings, model, lora, stored_bytes=sum(path.stat().st_size for path in files))


def measure_network(
    settings: Mapping[str, Any], model: ModelConfig, lora: LoraConfig, *, stored_bytes: int = 0
) -> NetworkSize:
    """The same for a transformer of these settings. `stored_bytes`: its files', for precision `file`."""
    network = empty_transformer(dict(settings))
    num_weights = sum(weight.numel() for weight in network.parameters())
    adapter_weights = num_parameters(network, lora)
    adapted = {name: network.get_submodule(name) for name in target_modules(network, lora)}
    lighten(network)
    blocks = list(network.transformer_blocks)
    network.transformer_blocks = nn.ModuleList()
    config: Any = network.config
    return NetworkSize(
        num_blocks=len(blocks),
        width=network.inner_dim,
        heads=config.num_attention_heads,
        latent_channels=config.in_channels // 4,
        prompt_width=config.joint_attention_dim,
        block=_weights(blocks[0]),
        last_block=_weights(blocks[-1]),
        border=_weights(network),
        precision=model.base_model_precision,
        element_bytes=compute_dtype(model).itemsize,
        stored_bytes=stored_bytes / num_weights,
        adapted={match[1]: each.in_features for name, each in adapted.items() if (match := _BLOCK.fullmatch(name))},
        adapter_weights=adapter_weights,
        is_modulated_per_token=bool(settings.get("zero_cond_t")),
    )


def _weights(part: nn.Module) -> Weights:
    linears = [module for module in part.modules() if isinstance(module, nn.Linear)]
    matrices = tuple((linear.out_features, linear.in_features) for linear in linears)
    everything = sum(weight.numel() for weight in part.parameters())
    return Weights(matrices, everything - sum(rows * columns for rows, columns in matrices))
