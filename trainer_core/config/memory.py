"""Settings that trade time for memory. None of them changes what is learned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..settings import If, Limits, Settings, setting

MemoryPlanning = Literal["auto", "manual"]
CompileBlocks = Literal["auto", "on", "off"]
_MANUAL = If("memory", ("manual",))


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryConfig(Settings):
    """What stays in VRAM, what is recomputed, and what is moved to RAM."""

    memory: MemoryPlanning = setting(
        "auto",
        "auto chooses what is recomputed, offloaded and streamed: the fastest settings with which the run fits on the "
        "device. manual uses gradient_checkpointing and the settings below as they are.",
    )
    gradient_checkpointing_blocks: int = setting(
        -1,
        "Number of transformer blocks, counted from the first, whose activations are recomputed in the backward pass. "
        "-1 for all. Fewer is faster and needs more VRAM. Applies if gradient_checkpointing is on.",
        Limits(min=-1, soft_max=1000),
        used_if=(_MANUAL,),
    )
    activation_offload: bool = setting(
        False,
        "Move what recomputed blocks keep to RAM: their inputs and attention's output. Saves 5 GiB of VRAM in bf16 at "
        "1 megapixel.",
        used_if=(_MANUAL,),
    )
    blocks_to_stream: int = setting(
        0,
        "Number of blocks whose frozen weights stay in RAM and are copied to VRAM just in time, in the "
        "forward and the backward pass. The full model has 60. For cards that can't hold the model; needs "
        "gradient_checkpointing.",
        Limits(min=0, soft_max=1000),
        used_if=(_MANUAL,),
    )
    stream_buffers: int = setting(
        2,
        "VRAM reserved for streamed weights, in blocks. 2 are enough if a block takes longer to compute than to copy.",
        Limits(min=2, max=16, unit="blocks"),
    )
    OLDER: ClassVar = {"compile_blocks": {"True": "on", "False": "off"}}  # true and false in job files and saved graphs
    compile_blocks: CompileBlocks = setting(
        "auto",
        "Compile the blocks with torch.compile: takes about a minute at the start, then steps are faster. Needs a CUDA "
        "device and Triton. auto: compile if that shortens the run.",
    )
    vram_gib: float = setting(
        0.0,
        "With memory auto: VRAM to plan for, in GiB. 0 for what is free now.",
        Limits(min=0, unit="GiB", soft_max=1000, step=0.5),
    )
    recompute_attention: bool = setting(
        False,
        "Also compute attention again in recomputed blocks, instead of keeping its output. Slower. Saves 2.6 GiB of "
        "VRAM in bf16 at 1 megapixel.",
        used_if=(_MANUAL,),
    )
