"""The plan: what every part of a training takes in device and host memory, phase by phase."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ..config import TrainConfig
from ..memory.offload import offloaded_bytes
from ..memory.placement import recomputed_blocks
from ..training.ema import ema_bytes
from ..training.optimizer import optimizer_bytes
from .activations import (
    Tokens,
    backward_bytes,
    border_bytes,
    boundary_bytes,
    forward_bytes,
    kept_by_block,
    kept_bytes,
)
from .network import NetworkSize
from .workload import PairSize, Workload

GIB = 2**30
FLOAT32 = 4
# Of the VAE as `vae.for_pictures` leaves it: its weights, and elements per pixel that a picture takes besides them.
VAE_WEIGHTS = 44_599_603
DECODING_ELEMENTS = 675
ENCODING_ELEMENTS = 581
LIBRARY_BYTES = 100 * 2**20  # workspaces of cuBLAS and others, which torch's allocator counts
PROCESS_BYTES = 3 * GIB  # Python, torch and CUDA in host memory
ENCODED_BYTES = GIB  # encoded pairs that the loader holds
OFFLOADED_ON_DEVICE = 4  # blocks' inputs that are on their way between device and host


@dataclass(frozen=True, slots=True)
class Phase:
    """A time of the run, and bytes of device memory by what takes them."""

    name: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """`device`: phases of the run on the device. `host`: what takes host memory, at its fullest moment."""

    config: TrainConfig
    network: NetworkSize
    work: Workload
    recomputed: int
    streamed: int
    device: tuple[Phase, ...]
    host: Mapping[str, int]

    @property
    def device_peak_bytes(self) -> int:
        """What the fullest phase takes."""
        return self.fullest.total_bytes

    @property
    def host_peak_bytes(self) -> int:
        """What the process takes of host memory."""
        return sum(self.host.values())

    @property
    def fullest(self) -> Phase:
        """The phase that decides whether the run fits."""
        return max(self.device, key=lambda phase: phase.total_bytes)

    def phase(self, name: str) -> Phase | None:
        """The phase of that name."""
        return next((phase for phase in self.device if phase.name == name), None)

    @property
    def needed_device_bytes(self) -> int:
        """The peak with a margin: a tenth of what is estimated, none of what is counted, half a GiB for gaps."""
        return max(phase.total_bytes + _estimated(phase) // 10 for phase in self.device) + GIB // 2


COUNTED = (
    "frozen weights",
    "streaming buffers",
    "adapter",
    "running average",
    "optimizer state",
    "VAE",
    "VAE for references",
)


def _estimated(phase: Phase) -> int:
    return sum(size for what, size in phase.parts.items() if what not in COUNTED)


def plan_memory(config: TrainConfig, network: NetworkSize, work: Workload) -> MemoryPlan:
    """Plan a training under settings taken as they are, `memory` auto or not.

    Raises:
        ConfigError: settings of the memory that exclude each other.
    """
    recomputed = recomputed_blocks(config.memory, network.num_blocks, checkpointing=config.gradient_checkpointing)
    streamed = min(config.memory.blocks_to_stream, recomputed)
    resting = {**_resting(config, network, streamed), **_on_the_fly(network, work.encoded)}
    tokens = work.tokens
    phases = [
        Phase("loading", {**_weights(config, network, streamed), "a layer on its way": _layer_bytes(network)}),
        Phase("training", {**resting, "gradients": FLOAT32 * network.adapter_weights,
                           **_step(config, network, tokens, recomputed)}),
        *_validation(config, network, work.validation, resting),
    ]  # fmt: skip
    return MemoryPlan(
        config=config,
        network=network,
        work=work,
        recomputed=recomputed,
        streamed=streamed,
        device=tuple(phases),
        host=_host(config, network, tokens, recomputed=recomputed, streamed=streamed),
    )


def _weights(config: TrainConfig, network: NetworkSize, streamed: int) -> dict[str, int]:
    parts = {"frozen weights": network.weight_bytes - streamed * network.block_bytes}
    if streamed:
        parts["streaming buffers"] = min(config.memory.stream_buffers, streamed) * network.block_bytes
    return parts


def _resting(config: TrainConfig, network: NetworkSize, streamed: int) -> dict[str, int]:
    """What is on the device from the first step to the last."""
    copies = network.element_bytes if network.element_bytes < FLOAT32 else 0
    _, average = ema_bytes([(network.adapter_weights,)], config.ema)
    return {
        **_weights(config, network, streamed),
        "adapter": (FLOAT32 + copies) * network.adapter_weights,
        **({"running average": average} if average else {}),
        "optimizer state": optimizer_bytes(config.optimizer.optimizer, network.adapter_shapes),
        "libraries": LIBRARY_BYTES,
    }


def _on_the_fly(network: NetworkSize, pixels: int) -> dict[str, int]:
    """The VAE that encodes references ahead of the steps, in a thread of its own."""
    if not pixels:
        return {}
    return {
        "VAE for references": VAE_WEIGHTS * network.element_bytes,
        "encoding a reference": ENCODING_ELEMENTS * network.element_bytes * pixels,
    }


def _step(config: TrainConfig, network: NetworkSize, tokens: Tokens, recomputed: int) -> dict[str, int]:
    """Activations at the fullest moment: going backward through the last block, or through the last recomputed one."""
    rows = kept_by_block(
        network,
        rank=config.lora.lora_rank,
        batch=tokens.batch,
        dropout=config.lora.lora_dropout > 0,
    )
    kept, boundary = kept_bytes(rows, tokens), boundary_bytes(network, tokens)
    computed = network.num_blocks - recomputed
    waiting = max(0, recomputed - (computed == 0))  # the input of the block at work is among what it keeps
    if config.memory.activation_offload:
        waiting = min(waiting, OFFLOADED_ON_DEVICE)
    return {
        "blocks' inputs": waiting * boundary,
        "activations": max(1, computed) * kept,
        "backward pass": backward_bytes(network, tokens) + _layer_bytes(network),
        "latents and embeddings": border_bytes(network, tokens),
    }


def _layer_bytes(network: NetworkSize) -> int:
    """The largest layer's weight in the arithmetic's type, twice: as it is dequantised, and as it is used."""
    return 2 * network.largest_layer_weights * network.element_bytes


def _validation(
    config: TrainConfig, network: NetworkSize, pair: PairSize | None, resting: Mapping[str, int]
) -> list[Phase]:
    """Drawing, where the prompt and the negative one take turns, and decoding, with the transformer still there."""
    if pair is None or not config.validation.num_validation_images:
        return []
    tokens = Tokens(batch=1, image=pair.image_tokens, text=pair.text_tokens)
    drawing = {
        "forward pass": forward_bytes(network, tokens) + _layer_bytes(network),
        "latents and embeddings": border_bytes(network, tokens),
    }
    pixels = pair.target.width * pair.target.height
    decoding = {
        "VAE": VAE_WEIGHTS * network.element_bytes,
        "decoding a picture": DECODING_ELEMENTS * network.element_bytes * pixels,
    }
    return [Phase("drawing", {**resting, **drawing}), Phase("decoding", {**resting, **decoding})]


def _host(
    config: TrainConfig, network: NetworkSize, tokens: Tokens, *, recomputed: int, streamed: int
) -> dict[str, int]:
    """Host memory. Loading holds two blocks unquantised, before pairs and offloaded inputs are there."""
    inputs = [boundary_bytes(network, part) for part in (replace(tokens, text=0), replace(tokens, image=0))]
    offloaded = offloaded_bytes(recomputed * inputs) if config.memory.activation_offload else 0
    block_weights = 2 * network.largest_layer_weights * FLOAT32
    parts = {
        "Python, torch and CUDA": PROCESS_BYTES,
        "streamed weights": streamed * network.block_bytes,
        "offloaded inputs of blocks": offloaded,
        "encoded pairs": ENCODED_BYTES,
        "running average": ema_bytes([(network.adapter_weights,)], config.ema)[0],
        "layers on their way": block_weights,
    }
    return {what: size for what, size in parts.items() if size}
