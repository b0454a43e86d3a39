"""Settings of a training's memory. None of them changes what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..settings import check, check_at_least, check_choice, setting
from .training import LoraConfig

MemoryPlanning = Literal["manual", "auto"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig:
    """What is kept on the device, what is computed again, and what waits in host memory."""

    memory: MemoryPlanning = setting(
        "manual", "manual takes the settings below; auto chooses them so that the training fits the device."
    )
    gradient_checkpointing_blocks: int = setting(
        -1,
        "With gradient_checkpointing on: how many of the transformer's blocks compute their activations again in the "
        "backward pass, counted from the first; -1 for all. Fewer is faster and takes more memory.",
    )
    activation_offload: bool = setting(
        False,
        "What such blocks need to compute again waits in host memory: 2.6 GiB less in bf16 at 1 MP.",
    )
    blocks_to_stream: int = setting(
        0,
        "Blocks whose frozen weights stay in host memory and are copied to the device just in time, forward and "
        "backward; 60 are all of them. For cards that can't hold the model; needs gradient_checkpointing.",
    )
    stream_buffers: int = setting(
        2, "Device memory for streamed weights, in blocks. 2 suffice where a block computes longer than it copies."
    )
    compile_blocks: bool = setting(
        False, "Compile the blocks with torch.compile: faster after a minute at the start. Needs Triton."
    )
    vram_gib: float = setting(0.0, "Under auto: device memory to plan for, in GiB; 0 for what is free.")

    def __post_init__(self) -> None:
        check_choice(self, "memory")
        check_at_least(self, -1, "gradient_checkpointing_blocks")
        check_at_least(self, 0, "blocks_to_stream", "vram_gib")
        check(2 <= self.stream_buffers <= 16, "stream_buffers", self.stream_buffers, "2 to 16 blocks")


def check_streaming(memory: MemoryConfig, lora: LoraConfig) -> None:
    """Raises ConfigError where blocks are to be streamed whose weights the adapter needs at other times."""
    streams_dora = lora.lora_type == "dora" and memory.blocks_to_stream > 0
    check(not streams_dora, "blocks_to_stream", memory.blocks_to_stream, "0 with lora_type dora")
