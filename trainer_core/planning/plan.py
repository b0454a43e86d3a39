"""The memory plan: device memory of a training run by phase and part, and host memory by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..config import TrainConfig
from ..memory.offload import offloaded_bytes
from ..memory.placement import recomputed_blocks
from ..memory.step_graphs import MOST_GRAPHS
from ..qwen_image.vae import GAPS, VAE_WEIGHTS
from ..qwen_image.vae_tiles import ENCODING_ELEMENTS, least_decoding_bytes
from ..training.ema import ema_bytes
from ..training.optimizer import optimizer_bytes
from .activations import (
    FLOAT32,
    Tokens,
    backward_bytes,
    block_input_bytes,
    forward_bytes,
    kept_bytes,
    last_backward_bytes,
    last_block_bytes,
    latent_and_embedding_bytes,
    saved_activation_bytes,
)
from .network import NetworkSize
from .workload import PairSize, Workload, picture_tokens

GIB = 2**30
_LIBRARIES = 100 * 2**20  # bytes of workspaces of cuBLAS and others, which torch's allocator counts
# Bytes of the driver and of inputs for the CUDA graphs of one size: 6 to 12 MiB for 12 blocks on an H200.
_GRAPH = 48 * 2**20
_PROCESS = 3 * GIB  # host memory of Python, torch, CUDA and the compiler
_LOADED_PAIRS = GIB  # host memory of the encoded pairs that the loader holds
_FETCHED_AHEAD = 1  # blocks whose offloaded activations are back on the device before they are needed
_EXACT = (  # parts that are counted, not estimated
    *("frozen weights", "streaming buffers", "adapter", "running average", "optimizer state"),
    *("VAE", "VAE for references", "few-step LoRA"),
)


@dataclass(frozen=True, slots=True)
class Phase:
    """A phase of the run, and its bytes of device memory by part."""

    name: str
    parts: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """Sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """`device`: device memory of each phase. `host`: bytes of host memory by part, at the peak. `recomputed`,
    `streamed`: number of blocks."""

    config: TrainConfig
    network: NetworkSize
    work: Workload
    recomputed: int
    streamed: int
    device: tuple[Phase, ...]
    host: Mapping[str, int]

    @property
    def device_peak_bytes(self) -> int:
        """Bytes of the largest phase."""
        return max(phase.total_bytes for phase in self.device)

    @property
    def host_peak_bytes(self) -> int:
        """Bytes of host memory."""
        return sum(self.host.values())

    def phase(self, name: str) -> Phase | None:
        """The phase with this name; None if the run doesn't have it."""
        return next((phase for phase in self.device if phase.name == name), None)

    @property
    def needed_device_bytes(self) -> int:
        """The peak with a margin: a tenth of the estimated parts, nothing for the counted ones, 0.5 GiB for gaps."""
        return max(phase.total_bytes + _estimated(phase) // 10 for phase in self.device) + GAPS


def _estimated(phase: Phase) -> int:
    return sum(size for what, size in phase.parts.items() if what not in _EXACT)


def plan_memory(config: TrainConfig, network: NetworkSize, work: Workload, *, graphs: bool = False) -> MemoryPlan:
    """Plan a run with exactly these settings; `memory` auto changes nothing here. `graphs`: steps run as CUDA graphs.

    Raises:
        ConfigError: the memory settings exclude each other.
    """
    recomputed = recomputed_blocks(config.memory, network.num_blocks, checkpointing=config.gradient_checkpointing)
    streamed = min(config.memory.blocks_to_stream, recomputed)
    resting = {**_resting(config, network, streamed), **_on_the_fly(network, work.on_the_fly_pixels)}
    tokens = work.tokens
    loading = {**_weights(config, network, streamed), "layer being loaded": _loading_bytes(config, network)}
    phases = [
        Phase("loading", loading),
        Phase("training", {**resting, **_step(config, network, tokens, recomputed, graphs=graphs)}),
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
    parts = {"frozen weights": network.weight_bytes - network.streamed_bytes(streamed)}
    if streamed:
        parts["streaming buffers"] = min(config.memory.stream_buffers, streamed) * network.block_bytes
    return parts


def _resting(config: TrainConfig, network: NetworkSize, streamed: int) -> dict[str, int]:
    """Parts that stay on the device from the first step to the last."""
    copies = network.element_bytes if network.element_bytes < FLOAT32 else 0
    _, average = ema_bytes([(network.adapter_weights,)], config.ema)
    return {
        **_weights(config, network, streamed),
        "adapter": (FLOAT32 + copies) * network.adapter_weights,
        **({"running average": average} if average else {}),
        "optimizer state": optimizer_bytes(config.optimizer.optimizer, network.adapter_shapes),
        "libraries": _LIBRARIES,
    }


def _on_the_fly(network: NetworkSize, pixels: int) -> dict[str, int]:
    """Memory of the VAE that encodes references in a thread while the steps run. `pixels`: of the largest reference."""
    if not pixels:
        return {}
    return {
        "VAE for references": VAE_WEIGHTS * network.element_bytes,
        "encoding a reference": ENCODING_ELEMENTS * network.element_bytes * pixels,
    }


def _step(
    config: TrainConfig, network: NetworkSize, tokens: Tokens, recomputed: int, *, graphs: bool
) -> dict[str, int]:
    """A step's memory by part at its peak.

    Without gradient accumulation, gradients take the place of activations block by block. Then the peak is at the
    backward pass of one of the last two blocks or of the first, or in the optimizer's update.

    CUDA graphs keep the memory of a step beside that of ordinary steps, which sizes without a graph need. With them,
    the gradients' memory is never freed.
    """
    dropout, compiled = config.lora.lora_dropout > 0, config.memory.compile_blocks == "on"
    saved = saved_activation_bytes(network, tokens, dropout=dropout, compiled=compiled)
    kept = kept_bytes(network, tokens, attention=not config.memory.recompute_attention)
    gradients = FLOAT32 * network.adapter_weights
    accumulates = graphs or config.batching.gradient_accumulation_steps > 1
    kind: dict[str, Any] = {
        "products": config.model.matmul_precision,
        "rounds_inputs": config.model.quantize_activations,
        "again_whole": dropout or any("_mod." in name for name in network.adapted),
        "is_dora": config.lora.lora_type == "dora",
    }
    working = backward_bytes(network, tokens, **kind)

    def in_backward(waiting: int, activations: int, working: int) -> dict[str, int]:
        """`waiting` blocks have yet to be recomputed."""
        return {
            "kept by recomputed blocks": kept * (min(waiting, _FETCHED_AHEAD) if offloads else waiting),
            "activations": activations,
            "gradients": gradients if accumulates else gradients // network.num_blocks,
            "backward pass": working,
            "latents and embeddings": latent_and_embedding_bytes(network, tokens),
        }

    offloads, others = config.memory.activation_offload, network.num_blocks - 1
    recomputed = min(recomputed, others)
    last = last_block_bytes(network, tokens, dropout=dropout)
    in_last = in_backward(
        recomputed, (others - recomputed) * saved + last, last_backward_bytes(network, tokens, **kind)
    )
    # The block whose turn it is has what it keeps in its activations.
    waiting = recomputed - 1 if recomputed == others else recomputed
    before_last = in_backward(max(0, waiting), max(1, others - recomputed) * saved, working)
    first = {**in_backward(0, saved, working), "gradients": gradients}
    # This optimizer divides all gradients at once; the others take one tensor after the other.
    denominators = gradients if config.optimizer.optimizer == "adamw-schedulefree" else 0
    update = {"gradients": gradients, "update": denominators}

    def size(parts: Mapping[str, int]) -> int:
        return sum(parts.values())

    peak = max(in_last, before_last, first, update, key=size)
    if not graphs:
        return peak
    captured = max(map(size, (in_last, before_last, first))) - gradients
    return {**peak, "CUDA graphs": captured + _LIBRARIES + MOST_GRAPHS * _GRAPH}


def _loading_bytes(config: TrainConfig, network: NetworkSize) -> int:
    """Bytes of the largest layer while it is loaded. Quanto makes two more copies: it scales, then it clamps."""
    made_here = network.precision.endswith("-quanto") and config.model.quantize_via == "accelerator"
    return (4 if made_here else 2) * network.largest_layer_weights * network.element_bytes


def _layer_bytes(network: NetworkSize) -> int:
    """Bytes of two copies of the largest layer's weight in the compute dtype: while dequantised, and while used."""
    return 2 * network.largest_layer_weights * network.element_bytes


def _validation(
    config: TrainConfig, network: NetworkSize, pair: PairSize | None, resting: Mapping[str, int]
) -> list[Phase]:
    """The phases sampling (prompt and negative prompt take turns) and decoding, with the transformer still loaded."""
    if pair is None or not config.validation.num_validation_images:
        return []
    tokens = Tokens(batch=1, image=pair.image_tokens, target=picture_tokens(pair.target), text=pair.text_tokens)
    sampling = {
        "forward pass": forward_bytes(network, tokens) + _layer_bytes(network),
        "latents and embeddings": latent_and_embedding_bytes(network, tokens),
    }
    if network.few_step_bytes:
        sampling["few-step LoRA"] = network.few_step_bytes
    height, width = pair.target.height, pair.target.width
    decoding = {
        "VAE": VAE_WEIGHTS * network.element_bytes,
        "decoding a picture": least_decoding_bytes(height, width, network.element_bytes),
    }
    return [Phase("sampling", {**resting, **sampling}), Phase("decoding", {**resting, **decoding})]


def _host(
    config: TrainConfig, network: NetworkSize, tokens: Tokens, *, recomputed: int, streamed: int
) -> dict[str, int]:
    """Host memory by part, without empty parts."""
    picture, prompt = (block_input_bytes(network, part) for part in (replace(tokens, text=0), replace(tokens, image=0)))
    kept = [picture, prompt] if config.memory.recompute_attention else [picture, prompt, picture + prompt]
    offloaded = offloaded_bytes(recomputed * kept) if config.memory.activation_offload else 0
    parts = {
        "Python, torch and CUDA": _PROCESS,
        "streamed weights": network.streamed_bytes(streamed),
        "offloaded activations": offloaded,
        "encoded pairs": _LOADED_PAIRS,
        "running average": ema_bytes([(network.adapter_weights,)], config.ema)[0],
        "few-step LoRA": network.few_step_bytes,
        # A streamed block that was not quantised on the device is copied into one piece of memory.
        "layers being loaded": max(2 * network.largest_layer_weights * FLOAT32, network.block_bytes if streamed else 0),
    }
    return {what: size for what, size in parts.items() if size}
