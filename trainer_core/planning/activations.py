"""Activation memory of a transformer block: what it saves for its backward pass, and its working memory.

Derived from `qwen_image/block.py`. A frozen linear layer without an adapter saves nothing: only a gradient of its
weight would need its input. Between 8-bit products, an MLP's first layer saves its result in place of gelu. A compiled
block saves the same, except tensors that it computes again in the backward pass. tests/numerics/test_memory_plan.py
compares the numbers with the tensors that real blocks save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from ..config import BaseModelPrecision, MatmulPrecision
from ..qwen_image.sampling import FORWARD_WIDTHS
from .network import NetworkSize

FLOAT32 = 4  # bytes
MASK_BYTES = 1  # per element of a dropout mask on CUDA devices
# Gradients at the peak of a block's backward pass, which is in the MLP, in widths per token: of the block's output (1),
# the MLP's output (1), the activation function's output (4) and its input (4).
_BACKWARD_WIDTHS = 10
# While the MLP's second layer multiplies (its gradients and its input's), and before that, while it is dequantised.
_PRODUCT_WIDTHS, _DEQUANTISING_WIDTHS = 7, 3
# While keys are rotated back, beside four tensors in float32; and what the MLP had saved.
_ROTATION_WIDTHS, _MLP_WIDTHS = 3, 6
# Two copies in float32 of the MLP's inner tensor, which is four widths wide, when it is rounded to 8 bits. In the first
# forward pass, a block holds fewer widths beside them than it saves in the second one.
_ROUNDED = 2 * FLOAT32 * 4
_HELD_LESS = 2
# What the MLP's second forward pass holds beside saved activations while a DoRA computes norms, in widths per token.
_DORA_WIDTHS = 6
# Copies of a weight in the compute dtype while it is dequantised; a layer that is not quantised needs none.
_DEQUANTISED_COPIES: dict[BaseModelPrecision, float] = {"none": 0, "fp8-quanto": 2, "file": 2, "int4-quanto": 2.25}
_LATENT_COPIES = 3  # of target and references: clean or noise, noisy, and the velocity


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Size of a micro-batch: its pairs, and per pair the picture tokens (target and references), those of the target,
    and prompt tokens."""

    batch: int
    image: int
    target: int
    text: int

    @property
    def of_target(self) -> Tokens:
        """The targets' tokens alone."""
        return replace(self, image=self.target, text=0)


@dataclass(frozen=True, slots=True)
class SavedActivation:
    """A tensor that a block saves: bytes per picture token and per prompt token."""

    what: str
    image: float
    text: float


def saved_activation_bytes(
    network: NetworkSize, tokens: Tokens, *, dropout: bool = False, compiled: bool = False
) -> int:
    """Bytes that one block saves for its backward pass if it is not recomputed."""
    width = network.element_bytes * network.width
    rows = [
        SavedActivation("input of the block, for the first norm", width + 8, width + 8),
        SavedActivation("queries and keys before their norm", 2 * width, 2 * width),
        SavedActivation("queries, keys, values and attention output", *2 * [4 * width + FLOAT32 * network.heads]),
        SavedActivation("input of the second norm", width + 8, width + 8),
        SavedActivation("input of the MLP's activation function", 4 * width, 4 * width),
        *_layer_inputs(network, dropout=dropout, compiled=compiled),
        *_adapter_activations(network, dropout=dropout),
    ]
    return round(tokens.batch * sum(row.image * tokens.image + row.text * tokens.text for row in rows))


def last_block_bytes(network: NetworkSize, tokens: Tokens, *, dropout: bool = False) -> int:
    """Bytes that the last block saves: for the targets' tokens what every block saves, for all others its input, and
    keys and values."""
    width, others = network.element_bytes * network.width, tokens.image - tokens.target + tokens.text
    saved = saved_activation_bytes(network, tokens.of_target, dropout=dropout)
    return saved + tokens.batch * others * (4 * width + 8 + FLOAT32 * network.heads)


def _layer_inputs(network: NetworkSize, *, dropout: bool, compiled: bool) -> Iterator[SavedActivation]:
    """Inputs of linear layers that the layer or its adapter saves. With dropout, an adapter saves the input after
    dropout instead, which `_adapter_activations` counts."""
    width = network.element_bytes * network.width
    adapted = () if dropout else network.adapted

    def share(wide: float, *sides: tuple[str, ...]) -> list[float]:
        return [wide * any(name in adapted for name in names) for names in sides]

    attention_in = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    yield SavedActivation("input of the q, k and v projections", *share(width, *attention_in))
    first, second = (tuple((f"{side}_mlp.net.{layer}",) for side in ("img", "txt")) for layer in ("0.proj", "2"))
    yield SavedActivation("input of the MLP's first layer", *share(width, *first))
    yield SavedActivation("input of the MLP's second layer", *share(4 * width, *second))
    # With an adapter on the modulation, the scales and gates get gradients, which need the tensors they multiply.
    # A compiled block keeps one of the four and computes the others again.
    modulated = [(1 if compiled else 4) * width * (name in network.adapted) for name in ("img_mod.1", "txt_mod.1")]
    yield SavedActivation("modulated tensors", *modulated)


def _adapter_activations(network: NetworkSize, *, dropout: bool) -> Iterator[SavedActivation]:
    """What the adapters save besides their input, such as lora_B's input; with dropout also that input and the mask."""
    e = network.element_bytes
    inner, dropped = [0.0, 0.0], [0.0, 0.0]
    for name, layer in network.adapted.items():
        if "_mod." in name:  # one row per pair, not per token
            continue
        side = int(name.startswith("txt_") or ".add_" in name or name.endswith("to_add_out"))
        inner[side] += layer.saved * e
        dropped[side] += layer.inputs * (e + MASK_BYTES)
    yield SavedActivation("inside adapters", *inner)
    if dropout:
        yield SavedActivation("adapter inputs after dropout, and masks", *dropped)


def kept_bytes(network: NetworkSize, tokens: Tokens, *, attention: bool) -> int:
    """Bytes that a recomputed block saves: its inputs, and with `attention` that one's output and log-sum-exp."""
    lengths = FLOAT32 * network.heads * tokens.batch * (tokens.image + tokens.text)
    return block_input_bytes(network, tokens) * (1 + attention) + attention * lengths


def block_input_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Bytes of a block's inputs."""
    return tokens.batch * network.element_bytes * network.width * (tokens.image + tokens.text)


def backward_bytes(
    network: NetworkSize,
    tokens: Tokens,
    *,
    products: MatmulPrecision = "bf16",
    rounds_inputs: bool = False,
    again_whole: bool = False,
    is_dora: bool = False,
) -> int:
    """Working memory of a block's backward pass and of its second forward pass, which need about the same.

    It includes the prompt's gradient that waits meanwhile. `products` is `matmul_precision`; `auto` counts what needs
    more. `rounds_inputs`: linear layers round their inputs, in float32; the MLP's second layer does so in the second
    forward pass only if that is `again_whole`. `is_dora`: the second forward pass also dequantises the weights of
    adapted layers to float32, for their norms.
    """
    width = network.element_bytes * network.width
    pictures = tokens.batch * tokens.image * width
    most = [
        _BACKWARD_WIDTHS * pictures,
        _PRODUCT_WIDTHS * pictures + _beside_product(network, tokens, products),
        _DEQUANTISING_WIDTHS * pictures + _before_product(network, products),
    ]
    if rounds_inputs and products != "8bit":  # before the product, so without its result and its weight
        beside = _BACKWARD_WIDTHS - 1 if again_whole else -_HELD_LESS
        most.append(beside * pictures + _ROUNDED * network.width * tokens.batch * tokens.image)
    prompts = tokens.batch * width * tokens.text
    least = 0
    if is_dora and any("_mlp." in name for name in network.adapted):
        least = _DORA_WIDTHS * pictures + dequantised_bytes(network, FLOAT32)
    return max(least, max(most) + prompts)


def last_backward_bytes(network: NetworkSize, tokens: Tokens, **kind: Any) -> int:
    """Working memory of the last block's backward pass: of its MLP, which sees the targets' tokens only, or of the
    rotation of all keys, when what the MLP saved is no longer held. `kind` is that of `backward_bytes`."""
    mlp = backward_bytes(network, tokens.of_target, **kind)
    per_token = network.width * (4 * FLOAT32 + _ROTATION_WIDTHS * network.element_bytes)
    freed = _MLP_WIDTHS * network.element_bytes * network.width * tokens.target
    return max(mlp, tokens.batch * (per_token * (tokens.image + tokens.text) - freed))


def _beside_product(network: NetworkSize, tokens: Tokens, products: MatmulPrecision) -> int:
    """Bytes that the product of an MLP layer needs beside its input and its result."""
    exact = dequantised_bytes(network, copies=1)
    if products == "bf16" or network.precision == "none":
        return exact
    # The weight's codes: transposed, or made of another format. With those of the gradient.
    codes = (4 * network.width + tokens.batch * tokens.image) * network.width
    return codes if products == "8bit" else max(exact, codes)


def _before_product(network: NetworkSize, products: MatmulPrecision) -> int:
    """Bytes that an MLP layer's weight needs until it can be multiplied. 8-bit codes are made at once."""
    return 0 if products == "8bit" else dequantised_bytes(network)


def dequantised_bytes(network: NetworkSize, element_bytes: int = 0, copies: float = 0) -> int:
    """Bytes of an MLP layer's weight while it is dequantised, to the compute dtype or a dtype of `element_bytes`.

    `copies` 1: while it is used. Larger layers run at other times.
    """
    held = _DEQUANTISED_COPIES.get(network.precision, 1)
    copies = min(held, copies) if copies else held
    return round(copies * (element_bytes or network.element_bytes) * 4 * network.width**2)


def forward_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Working memory of a block's forward pass without gradients, inputs included."""
    return FORWARD_WIDTHS * block_input_bytes(network, tokens)


def latent_and_embedding_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Latents, prompt embeddings and rotary angles, which exist during the whole step."""
    rotary = 8 * network.width // network.heads // 2
    latents = _LATENT_COPIES * FLOAT32 * 4 * network.latent_channels
    embeddings = (FLOAT32 + network.element_bytes) * network.prompt_width
    return tokens.batch * ((rotary + latents) * tokens.image + (rotary + embeddings) * tokens.text)
