"""What a transformer block keeps for its backward pass, and what it needs besides while it works.

Read off diffusers' QwenImageTransformerBlock with frozen weights: a linear layer without an adapter keeps nothing, for
its input would only be needed for a gradient of its weight. Widths d are the block's, bytes e those of the arithmetic.
tests/numerics/test_memory_plan.py counts the saved tensors of a real block and finds the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from .network import NetworkSize

_FLOAT32 = 4
MASK_BYTES = 1  # of a dropout, per number, on CUDA devices
_KEEP_INPUTS = ("int4-quanto", "int2-quanto")  # quanto's own layers keep their inputs, which nobody needs
# What the backward pass of a block holds besides what the forward pass kept, in widths per token: at the widest moment,
# in the MLP, the gradients of the block's output (1), of the MLP's output (1), of the activation function's output (4)
# and of its input (4).
_BACKWARD_WIDTHS = 10
_LATENT_COPIES = 3  # of target and references: clean or noise, noisy, and the velocity
_FORWARD_WIDTHS = 14  # without gradients, at the widest moment


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Of a micro-batch: pairs, tokens of the pictures (target and references) and of the prompt, per pair."""

    batch: int
    image: int
    text: int


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes per token of the picture and of the prompt that a block keeps for one reason."""

    what: str
    image: float
    text: float


def kept_by_block(network: NetworkSize, *, rank: int, batch: int, dropout: bool = False) -> list[Kept]:
    """Everything a block keeps for its backward pass, if it does not compute it again."""
    width = network.element_bytes * network.width
    rows = [
        Kept("the block's input, for the first norm", width + 8, width + 8),
        Kept("queries and keys before their norm", 2 * width, 2 * width),
        Kept("their lengths", *2 * [2 * _FLOAT32 * network.heads]),
        Kept("queries, keys, values and output of the attention", *2 * [4 * width + _FLOAT32 * network.heads]),
        Kept("the second norm's input", width + 8, width + 8),
        Kept("the MLP's activation function's input", 4 * width, 4 * width),
        *_inputs_of_layers(network, batch=batch, dropout=dropout),
        *_kept_by_adapters(network, rank=rank, dropout=dropout),
    ]
    if network.is_modulated_per_token:
        rows.append(Kept("gates, which differ between target and references", 2 * width, 0))
    return [row for row in rows if row.image or row.text]


def _inputs_of_layers(network: NetworkSize, *, batch: int, dropout: bool) -> Iterator[Kept]:
    """Inputs of linear layers that an adapter, or the layer itself, wants again. Under dropout an adapter wants what
    was left of them, which is counted with the adapters."""
    width, keep_all = network.element_bytes * network.width, network.precision in _KEEP_INPUTS
    adapted = () if dropout else network.adapted

    def share(wide: float, *sides: tuple[str, ...]) -> list[float]:
        return [wide * (keep_all or any(name in adapted for name in names)) for names in sides]

    attention_in = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    yield Kept("input of the attention's layers", *share(width, *attention_in))
    if batch > 1:  # a copy: the picture's and the prompt's part of a batch don't lie in one piece
        yield Kept("input of the attention's last layers", *share(width, ("attn.to_out.0",), ("attn.to_add_out",)))
    first, second = (tuple((f"{side}_mlp.net.{layer}",) for side in ("img", "txt")) for layer in ("0.proj", "2"))
    yield Kept("input of the MLP's first layer", *share(width, *first))
    yield Kept("input of the MLP's second layer", *share(4 * width, *second))
    # With an adapter on the modulation, its factors get gradients, which need what they are multiplied with.
    modulated = [4 * width * (name in network.adapted) for name in ("img_mod.1", "txt_mod.1")]
    yield Kept("what is modulated", *modulated)


def _kept_by_adapters(network: NetworkSize, *, rank: int, dropout: bool) -> Iterator[Kept]:
    """Inputs of lora_B; under dropout each adapter's own input and its mask."""
    e = network.element_bytes
    inner, dropped = [0.0, 0.0], [0.0, 0.0]
    for name, inputs in network.adapted.items():
        if "_mod." in name:  # one row a pair, not a token
            continue
        side = int(name.startswith("txt_") or ".add_" in name or name.endswith("to_add_out"))
        inner[side] += rank * e
        dropped[side] += inputs * (e + MASK_BYTES)
    yield Kept("the adapters' inner values", *inner)
    if dropout:
        yield Kept("the adapters' inputs under dropout", *dropped)


def kept_bytes(rows: list[Kept], tokens: Tokens) -> int:
    """Bytes that one block keeps."""
    return round(tokens.batch * sum(row.image * tokens.image + row.text * tokens.text for row in rows))


def boundary_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Bytes of a block's inputs, which is all that a block keeps that computes the rest again."""
    return tokens.batch * network.element_bytes * network.width * (tokens.image + tokens.text)


def backward_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """What the backward pass of a block needs besides what was kept; the prompt's gradient waits meanwhile."""
    width = network.element_bytes * network.width
    return tokens.batch * width * (_BACKWARD_WIDTHS * tokens.image + tokens.text)


def forward_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """What the forward pass of a block needs when nothing is kept, its inputs included."""
    return tokens.batch * network.element_bytes * network.width * _FORWARD_WIDTHS * (tokens.image + tokens.text)


def border_bytes(network: NetworkSize, tokens: Tokens) -> int:
    """Latents, embeddings and rotary angles, which are there all the time."""
    rotary = 8 * network.width // network.heads // 2
    latents = _LATENT_COPIES * _FLOAT32 * 4 * network.latent_channels
    embeddings = (_FLOAT32 + network.element_bytes) * network.prompt_width
    return tokens.batch * ((rotary + latents) * tokens.image + (rotary + embeddings) * tokens.text)
