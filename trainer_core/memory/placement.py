"""Applies MemoryConfig to a transformer: recomputation, block streaming and activation offload."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..config import MemoryConfig, TrainConfig
from ..errors import ConfigError
from ..packages import need_triton
from .capture import Copies
from .offload import HostCopies
from .recompute import Recomputation
from .streaming import BlockStream

if TYPE_CHECKING:
    from diffusers import QwenImageTransformer2DModel


_LARGE = 2  # tensors that a block keeps besides attention's output; as many are fetched ahead as a block keeps


def recomputed_blocks(memory: MemoryConfig, num_layers: int, *, checkpointing: bool) -> int:
    """The number of blocks, counted from the first, that recompute their activations in the backward pass."""
    if not checkpointing:
        return 0
    wanted = memory.gradient_checkpointing_blocks
    return num_layers if wanted < 0 else min(wanted, num_layers)


def blocks_on_host(memory: MemoryConfig, num_layers: int, *, checkpointing: bool) -> tuple[int, ...]:
    """Numbers of the streamed blocks, spread evenly: resident blocks compute while the next streamed one is copied.

    Raises:
        ConfigError: more blocks are streamed than recomputed. The backward pass of any other block would need weights
            that are no longer on the device.
    """
    again = recomputed_blocks(memory, num_layers, checkpointing=checkpointing)
    wanted = min(memory.blocks_to_stream, num_layers)
    if wanted > again:
        raise ConfigError(
            f"blocks_to_stream is {memory.blocks_to_stream}, but must be at most the {again} blocks that are "
            "recomputed. Turn gradient_checkpointing on and set gradient_checkpointing_blocks to -1."
        )
    return tuple(index * again // wanted for index in range(wanted))


def stream_blocks(
    transformer: QwenImageTransformer2DModel, numbers: tuple[int, ...], device: torch.device, memory: MemoryConfig
) -> BlockStream | None:
    """Stream the blocks with these numbers. Returns None if there are none."""
    blocks = [transformer.transformer_blocks[number] for number in numbers]
    return BlockStream(blocks, device, memory.stream_buffers) if blocks else None


def apply_memory(
    transformer: QwenImageTransformer2DModel, stream: BlockStream | None, device: torch.device, config: TrainConfig
) -> Copies:
    """Set up recomputation and activation offload of the transformer's blocks. Returns what copies during a step."""
    blocks = list(transformer.transformer_blocks)
    again = recomputed_blocks(config.memory, len(blocks), checkpointing=config.gradient_checkpointing)
    offload = (
        HostCopies(device, ahead=_LARGE + (not config.memory.recompute_attention))
        if again and config.memory.activation_offload
        else None
    )
    if again:
        how = Recomputation(
            blocks,
            again,
            stream=stream,
            offload=offload,
            keeps_attention=not config.memory.recompute_attention,
            dropout=config.lora.lora_dropout > 0,
        )
        transformer.enable_gradient_checkpointing(how)
    return Copies(stream, offload)


def take_apart(transformer: QwenImageTransformer2DModel) -> None:
    """Free all memory of a transformer that is of no more use, whatever still refers to its blocks.

    torch's compiler may: what it has traced is freed late, after several passes of Python's garbage collector.
    """
    again = vars(transformer).get("_gradient_checkpointing_func")
    if isinstance(again, Recomputation):
        again.stream = again.offload = None
    for module in list(transformer.modules()):
        vars(module).clear()


def check_compiler(memory: MemoryConfig, device: torch.device) -> None:
    """Check that blocks can be compiled, if `compile_blocks` is on.

    Raises:
        ConfigError: the device is not a CUDA device.
        MissingPackageError: triton is not installed.
    """
    if memory.compile_blocks != "on":
        return
    if device.type != "cuda":
        raise ConfigError(
            f"compile_blocks is on, which needs a CUDA device, but the device is {device}. Set it to auto."
        )
    need_triton("compile_blocks")
