"""Sizes of the transformer and its adapter: numbers of weights, and their bytes in a precision."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from torch import nn

from ..adapters.plan import AdapterPlan, LayerPlan, lokr_shapes
from ..adapters.reader import AdapterPart
from ..adapters.second_lora import second_lora_bytes
from ..config import BaseModelPrecision, LoraConfig, ModelConfig
from ..precision.weight_bytes import WeightShapes, stored_bytes
from ..qwen_image.base_model import compute_dtype

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel

_BLOCK = re.compile(r"transformer_blocks\.\d+\.(.+)")


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """An adapted layer's input width, and the elements per token that its adapter saves besides its input."""

    inputs: int
    saved: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkSize:
    """`adapted`: each adapted layer by its name within a block. `adapter_shapes`: of all blocks' adapter weights.
    `element_bytes`: of an unquantised weight. `file_bytes_per_weight`: used by the precision `file`. `few_step_bytes`:
    of the few-step LoRA's matrices on the device, while validation pictures are drawn."""

    num_blocks: int
    width: int
    heads: int
    latent_channels: int
    prompt_width: int
    block: WeightShapes
    last_block: WeightShapes
    weights_outside_blocks: int
    precision: BaseModelPrecision
    element_bytes: int
    file_bytes_per_weight: float
    adapted: Mapping[str, AdaptedLayer]
    adapter_shapes: tuple[tuple[int, ...], ...]
    few_step_bytes: int = 0

    @property
    def adapter_weights(self) -> int:
        """Number of trained weights."""
        return sum(map(prod, self.adapter_shapes))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block's frozen weights."""
        return self._bytes(self.block)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all frozen weights. Those outside the blocks are never quantised."""
        return self.streamed_bytes(self.num_blocks) + self.weights_outside_blocks * self.element_bytes

    def streamed_bytes(self, blocks: int) -> int:
        """Bytes of the frozen weights of so many streamed blocks. The last block, which is smaller, is the last to be
        streamed."""
        includes_last = blocks == self.num_blocks
        return (blocks - includes_last) * self.block_bytes + includes_last * self._bytes(self.last_block)

    @property
    def largest_layer_weights(self) -> int:
        """Number of weights in a block's largest layer."""
        return max(rows * columns for rows, columns in self.block.matrices)

    def _bytes(self, weights: WeightShapes) -> int:
        return stored_bytes(weights, self.precision, self.element_bytes, in_file=self.file_bytes_per_weight)


def network_size(
    network: QwenImageTransformer2DModel,
    adapter: AdapterPlan,
    model: ModelConfig,
    file_bytes_per_weight: float = 0.0,
    few_step_lora: Mapping[str, AdapterPart] | None = None,
) -> NetworkSize:
    """The sizes of a transformer, which may be on the meta device, with the adapter it is going to get.

    `few_step_lora`: the weight changes of `validation_lora`, by layer.
    """
    blocks, config = list(network.transformer_blocks), network.config
    adapted: dict[str, AdaptedLayer] = {}
    for name, layer in adapter.layers.items():
        if match := _BLOCK.fullmatch(name):  # ranks can differ between blocks: the one that saves most counts
            found = _adapted_layer(layer, adapter.config)
            adapted[match[1]] = max(adapted.get(match[1], found), found, key=lambda each: each.saved)
    return NetworkSize(
        num_blocks=len(blocks),
        width=network.inner_dim,
        heads=config.num_attention_heads,  # type: ignore[attr-defined]
        latent_channels=config.in_channels // 4,  # type: ignore[attr-defined]
        prompt_width=config.joint_attention_dim,  # type: ignore[attr-defined]
        block=_weight_shapes(blocks[0]),
        last_block=_weight_shapes(blocks[-1]),
        weights_outside_blocks=_count(network) - _count(network.transformer_blocks),
        precision=model.base_model_precision,
        element_bytes=compute_dtype(model).itemsize,
        file_bytes_per_weight=file_bytes_per_weight,
        adapted=adapted,
        adapter_shapes=adapter.shapes(),
        few_step_bytes=second_lora_bytes(few_step_lora or {}, compute_dtype(model).itemsize),
    )


def _adapted_layer(layer: LayerPlan, lora: LoraConfig) -> AdaptedLayer:
    saved = layer.rank  # lora_B's input
    if lora.lora_type == "dora":  # also the output, which the gain multiplies
        saved += layer.out_features
    if lora.lora_type == "lokr":  # inputs of the products after the first, each with as many columns as lokr_w1
        shapes = lokr_shapes(layer, lora.lokr_factor)
        rows = [shapes[name][0] for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b") if name in shapes]
        saved = shapes["lokr_w1"][1] * sum(rows)
    return AdaptedLayer(layer.in_features, saved)


def _weight_shapes(block: nn.Module) -> WeightShapes:
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    matrices = tuple((linear.out_features, linear.in_features) for linear in linears)
    return WeightShapes(matrices, _count(block) - sum(rows * columns for rows, columns in matrices))


def _count(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters())
