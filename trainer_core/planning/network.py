"""The transformer in numbers: weights of a block and of the rest, in a precision, and those of its adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from ..adapters.plan import AdapterPlan
from ..config import BaseModelPrecision, ModelConfig
from ..qwen_image.base_model import BaseModel, compute_dtype

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

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
    adapter_shapes: tuple[tuple[int, ...], ...]
    is_modulated_per_token: bool

    @property
    def adapter_weights(self) -> int:
        """How many numbers are trained."""
        return sum(map(prod, self.adapter_shapes))

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


def network_size(base: BaseModel, adapter: AdapterPlan) -> NetworkSize:
    """The sizes of a base model under an adapter; no weight is read.

    Raises:
        ModelFileError: no such transformer.
    """
    return measure_network(base.network, adapter, base.config, stored_bytes=base.bytes_per_weight)


def measure_network(
    network: QwenImageTransformer2DModel, adapter: AdapterPlan, model: ModelConfig, *, stored_bytes: float = 0.0
) -> NetworkSize:
    """The same for a network on the meta device.

    `stored_bytes`: bytes of a weight in its file, for precision `file`.
    """
    blocks, config = list(network.transformer_blocks), network.config
    adapted = {
        match[1]: layer.in_features for name, layer in adapter.layers.items() if (match := _BLOCK.fullmatch(name))
    }
    return NetworkSize(
        num_blocks=len(blocks),
        width=network.inner_dim,
        heads=config.num_attention_heads,  # type: ignore[attr-defined]
        latent_channels=config.in_channels // 4,  # type: ignore[attr-defined]
        prompt_width=config.joint_attention_dim,  # type: ignore[attr-defined]
        block=_weights([blocks[0]]),
        last_block=_weights([blocks[-1]]),
        border=_weights([part for name, part in network.named_children() if name != "transformer_blocks"]),
        precision=model.base_model_precision,
        element_bytes=compute_dtype(model).itemsize,
        stored_bytes=stored_bytes,
        adapted=adapted,
        adapter_shapes=adapter.shapes(),
        is_modulated_per_token=bool(network.zero_cond_t),
    )


def _weights(parts: Sequence[nn.Module]) -> Weights:
    linears = [module for part in parts for module in part.modules() if isinstance(module, nn.Linear)]
    matrices = tuple((linear.out_features, linear.in_features) for linear in linears)
    everything = sum(weight.numel() for part in parts for weight in part.parameters())
    return Weights(matrices, everything - sum(rows * columns for rows, columns in matrices))
