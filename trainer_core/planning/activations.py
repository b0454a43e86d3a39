"""Activation memory of a transformer block: what it saves for its backward pass, and its working memory.

Derived from diffusers' QwenImageTransformerBlock with frozen weights. A frozen linear layer without an adapter saves
nothing: only a gradient of its weight would need its input. A compiled block saves the same, except
tensors that it computes again in the backward pass. tests/numerics/test_memory_plan.py compares the numbers with the
tensors that real blocks save.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import BaseModelPrecision, MatmulPrecision
from ..qwen_image.sampling import FORWARD_WIDTHS
from .network import NetworkSize

FLOAT32 = 4  # bytes
MASK_BYTES = 1  # per element of a dropout mask on CUDA devices
# Gradients at the peak of a block's backward pass, which is in the MLP, in widths per token: of the block's output (1),
# the MLP's output (1), the activation function's output (4) and its input (4).
_BACKWARD_WIDTHS = 10
# What the MLP's second forward pass holds beside saved activations while a DoRA computes norms, in widths per token.
_DORA_WIDTHS = 6
# Copies of a weight in the compute dtype while it is dequantised; a layer that is not quantised needs none.
_DEQUANTISED_COPIES: dict[BaseModelPrecision, int] = {"none": 0, "fp8-quanto": 2, "file": 2, "int4-quanto": 2}
_LATENT_COPIES = 3  # of target and references: clean or noise, noisy, and the velocity


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Size of a micro-batch: its pairs, and per pair the picture tokens (target and references) and prompt tokens."""

    batch: int
    image: int
    text: int


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
        SavedActivation("their lengths", *2 * [2 * FLOAT32 * network.heads]),
        SavedActivation("queries, keys, values and attention output", *2 * [4 * width + FLOAT32 * network.heads]),
        SavedActivation("input of the second norm", width + 8, width + 8),
        SavedActivation("input of the MLP's activation function", 4 * width, 4 * width),
        *_layer_inputs(network, batch=tokens.batch, dropout=dropout, compiled=compiled),
        *_adapter_activations(network, dropout=dropout),
    ]
    if network.is_modulated_per_token:
        gates = 1 if compiled else 2  # the compiler computes one again
        rows.append(SavedActivation("gates, which differ between target and references", gates * width, 0))
    return round(tokens.batch * sum(row.image * tokens.image + row.text * tokens.text for row in rows))


def _layer_inputs(network: NetworkSize, *, batch: int, dropout: bool, compiled: bool) -> Iterator[SavedActivation]:
    """Inputs of linear layers that the layer or its adapter saves. With dropout, an adapter saves the input after
    dropout instead, which `_adapter_activations` counts."""
    width = network.element_bytes * network.width
    adapted = () if dropout else network.adapted

    def share(wide: float, *sides: tuple[str, ...]) -> list[float]:
        return [wide * any(name in adapted for name in names) for names in sides]

    attention_in = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    yield SavedActivation("input of the q, k and v projections", *share(width, *attention_in))
    if batch > 1:  # a copy, because the picture and prompt parts of a batch are not contiguous
        attention_out = share(width, ("attn.to_out.0",), ("attn.to_add_out",))
        yield SavedActivation("input of the attention's output projections", *attention_out)
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


def block_input_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Bytes of a block's inputs, which is all that a recomputed block saves."""
    return tokens.batch * network.element_bytes * network.width * (tokens.image + tokens.text)


def backward_bytes(
    network: NetworkSize,
    tokens: Tokens,
    *,
    products: MatmulPrecision = "bf16",
    rounds_inputs: bool = False,
    is_dora: bool = False,
) -> int:
    """Working memory of a block's backward pass and of its second forward pass, which need about the same.

    It includes the prompt's gradient that waits meanwhile. `products` is `matmul_precision`; `auto` counts what needs
    more. `rounds_inputs`: linear layers round their inputs, in float32 (`quantize_activations`). The MLP's second layer
    then needs two such copies of its input. `is_dora`: the second forward pass also dequantises the weights of adapted
    layers to float32, for their norms.
    """
    width = network.element_bytes * network.width
    image, layer, least = _BACKWARD_WIDTHS * width, _layer_bytes(network, tokens, products), 0
    if rounds_inputs and products != "8bit":  # before the product, so without its result and its weight
        image, layer = (_BACKWARD_WIDTHS - 1) * width + 2 * FLOAT32 * 4 * network.width, 0
    if is_dora and any("_mlp." in name for name in network.adapted):
        least = tokens.batch * _DORA_WIDTHS * width * tokens.image + dequantised_bytes(network, FLOAT32)
    return max(least, tokens.batch * (image * tokens.image + width * tokens.text) + layer)


def _layer_bytes(network: NetworkSize, tokens: Tokens, products: MatmulPrecision) -> int:
    """Bytes that the product of the MLP's second layer needs beside its input and its result."""
    exact = dequantised_bytes(network)
    if products == "bf16" or network.precision == "none":
        return exact
    codes = tokens.batch * tokens.image * 4 * network.width  # of the layer's input
    if network.precision == "int8-quanto":  # its codes are multiplied as they are, others may be rounded to int8 first
        return codes if products == "8bit" else max(exact, codes)
    return max(exact, codes + 4 * network.width**2)


def dequantised_bytes(network: NetworkSize, element_bytes: int = 0) -> int:
    """Bytes of an MLP layer's weight while it is used, in the compute dtype or a dtype of `element_bytes`.

    Larger layers run at other times.
    """
    copies = _DEQUANTISED_COPIES.get(network.precision, 1)
    return copies * (element_bytes or network.element_bytes) * 4 * network.width**2


def forward_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Working memory of a block's forward pass without gradients, inputs included."""
    return FORWARD_WIDTHS * block_input_bytes(network, tokens)


def latent_and_embedding_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Latents, prompt embeddings and rotary angles, which exist during the whole step."""
    rotary = 8 * network.width // network.heads // 2
    latents = _LATENT_COPIES * FLOAT32 * 4 * network.latent_channels
    embeddings = (FLOAT32 + network.element_bytes) * network.prompt_width
    return tokens.batch * ((rotary + latents) * tokens.image + (rotary + embeddings) * tokens.text)
