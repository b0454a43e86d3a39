"""What stays on the device, what is computed again and what waits in host memory, as MemoryConfig says."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch

from ..config import MemoryConfig, TrainConfig
from ..errors import ConfigError, MissingPackageError
from .offload import HostCopies
from .recompute import Recomputation
from .streaming import BlockStream

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


def recomputed_blocks(memory: MemoryConfig, num_layers: int, *, checkpointing: bool) -> int:
    """How many blocks, from the first on, compute their activations again."""
    if not checkpointing:
        return 0
    wanted = memory.gradient_checkpointing_blocks
    return num_layers if wanted < 0 else min(wanted, num_layers)


def blocks_on_host(memory: MemoryConfig, num_layers: int, *, checkpointing: bool) -> tuple[int, ...]:
    """Numbers of the streamed blocks, spread evenly, so that blocks which stay compute while others are copied.

    Raises:
        ConfigError: more blocks than are computed again, which would need their weights when these are gone.
    """
    again = recomputed_blocks(memory, num_layers, checkpointing=checkpointing)
    wanted = min(memory.blocks_to_stream, num_layers)
    if wanted > again:
        raise ConfigError(
            f"blocks_to_stream is {memory.blocks_to_stream}; allowed are at most the {again} blocks that are computed "
            "again. Turn gradient_checkpointing on and set gradient_checkpointing_blocks to -1."
        )
    return tuple(index * again // wanted for index in range(wanted))


def stream_blocks(
    transformer: QwenImageTransformer2DModel, numbers: tuple[int, ...], device: torch.device, memory: MemoryConfig
) -> BlockStream | None:
    """Stream the blocks of these numbers; None where there are none."""
    blocks = [transformer.transformer_blocks[number] for number in numbers]
    return BlockStream(blocks, device, memory.stream_buffers) if blocks else None


def apply_memory(
    transformer: QwenImageTransformer2DModel, stream: BlockStream | None, device: torch.device, config: TrainConfig
) -> None:
    """Have the transformer's blocks computed again, offloaded and compiled as the settings say."""
    blocks = list(transformer.transformer_blocks)
    again = recomputed_blocks(config.memory, len(blocks), checkpointing=config.gradient_checkpointing)
    check_compiler(config.memory)
    if config.memory.compile_blocks:
        _compile(blocks)
    if again:
        offload = HostCopies(device) if config.memory.activation_offload else None
        dropout = config.lora.lora_dropout > 0
        transformer.enable_gradient_checkpointing(
            Recomputation(blocks, again, stream=stream, offload=offload, dropout=dropout)
        )


def check_compiler(memory: MemoryConfig) -> None:
    """Raises MissingPackageError where blocks are to be compiled, and there is nothing to do it with."""
    if memory.compile_blocks and find_spec("triton") is None:
        raise MissingPackageError("triton", "compile_blocks")


def _compile(blocks: Sequence[torch.nn.Module]) -> None:
    """All blocks share one piece of code. Its variants (with and without gradients, the first block, the last) times
    the sizes of pictures pass torch's limit of 8, beyond which it would compile nothing more and only log it."""
    import torch._dynamo.config as dynamo

    name = "recompile_limit" if hasattr(dynamo, "recompile_limit") else "cache_size_limit"  # as before torch 2.6
    setattr(dynamo, name, max(64, getattr(dynamo, name)))
    for block in blocks:
        block.forward = torch.compile(block.forward)
