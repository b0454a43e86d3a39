"""Activation memory of a transformer block: what it saves for its backward pass, and its working memory.

Derived from diffusers' QwenImageTransformerBlock with frozen weights. A frozen linear layer without an adapter saves
nothing: only a gradient of its weight would need its input. tests/numerics/test_memory_plan.py compares the numbers
with the tensors that a real block saves.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ..qwen_image.sampling import FORWARD_WIDTHS
from .network import NetworkSize

FLOAT32 = 4  # bytes
MASK_BYTES = 1  # per element of a dropout mask on CUDA devices
# Gradients at the peak of a block's backward pass, which is in the MLP, in widths per token: of the block's output (1),
# the MLP's output (1), the activation function's output (4) and its input (4).
_BACKWARD_WIDTHS = 10
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


def saved_activation_bytes(network: NetworkSize, tokens: Tokens, *, rank: int, dropout: bool = False) -> int:
    """Bytes that one block saves for its backward pass if it is not recomputed."""
    width = network.element_bytes * network.width
    rows = [
        SavedActivation("input of the block, for the first norm", width + 8, width + 8),
        SavedActivation("queries and keys before their norm", 2 * width, 2 * width),
        SavedActivation("their lengths", *2 * [2 * FLOAT32 * network.heads]),
        SavedActivation("queries, keys, values and attention output", *2 * [4 * width + FLOAT32 * network.heads]),
        SavedActivation("input of the second norm", width + 8, width + 8),
        SavedActivation("input of the MLP's activation function", 4 * width, 4 * width),
        *_layer_inputs(network, batch=tokens.batch, dropout=dropout),
        *_adapter_activations(network, rank=rank, dropout=dropout),
    ]
    if network.is_modulated_per_token:
        rows.append(SavedActivation("gates, which differ between target and references", 2 * width, 0))
    return round(tokens.batch * sum(row.image * tokens.image + row.text * tokens.text for row in rows))


def _layer_inputs(network: NetworkSize, *, batch: int, dropout: bool) -> Iterator[SavedActivation]:
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
    modulated = [4 * width * (name in network.adapted) for name in ("img_mod.1", "txt_mod.1")]
    yield SavedActivation("modulated tensors", *modulated)


def _adapter_activations(network: NetworkSize, *, rank: int, dropout: bool) -> Iterator[SavedActivation]:
    """Inputs of lora_B; with dropout also each adapter's input and mask."""
    e = network.element_bytes
    inner, dropped = [0.0, 0.0], [0.0, 0.0]
    for name, inputs in network.adapted.items():
        if "_mod." in name:  # one row per pair, not per token
            continue
        side = int(name.startswith("txt_") or ".add_" in name or name.endswith("to_add_out"))
        inner[side] += rank * e
        dropped[side] += inputs * (e + MASK_BYTES)
    yield SavedActivation("outputs of lora_A", *inner)
    if dropout:
        yield SavedActivation("adapter inputs after dropout, and masks", *dropped)


def block_input_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Bytes of a block's inputs, which is all that a recomputed block saves."""
    return tokens.batch * network.element_bytes * network.width * (tokens.image + tokens.text)


def backward_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Working memory of a block's backward pass, with the prompt's gradient that waits meanwhile."""
    width = network.element_bytes * network.width
    return tokens.batch * width * (_BACKWARD_WIDTHS * tokens.image + tokens.text)


def forward_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Working memory of a block's forward pass without gradients, inputs included."""
    return FORWARD_WIDTHS * block_input_bytes(network, tokens)


def latent_and_embedding_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Latents, prompt embeddings and rotary angles, which exist during the whole step."""
    rotary = 8 * network.width // network.heads // 2
    latents = _LATENT_COPIES * FLOAT32 * 4 * network.latent_channels
    embeddings = (FLOAT32 + network.element_bytes) * network.prompt_width
    return tokens.batch * ((rotary + latents) * tokens.image + (rotary + embeddings) * tokens.text)
