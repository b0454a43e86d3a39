"""Seconds of a preview with and without a few-step LoRA: `python -m benchmarks.previews --layers 60 --device cuda`.

The full-size transformer with random weights and an adapter, set up as in training. The few-step LoRA has rank 64 on
all linear layers of the blocks, as the published ones have. Its time includes moving it to the device for each picture.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.sampling import conditions, wait
from tests.support.full_size_step import GIB, PROMPT_TOKENS, Setting, our_step
from trainer_core.adapters.inject import without_dropout
from trainer_core.adapters.reader import AdapterPart, LowRank
from trainer_core.adapters.second_lora import second_lora_bytes, with_second_lora
from trainer_core.precision.frozen_linear import exact_products
from trainer_core.qwen_image.sampling import ComfySchedule, load_scheduler, sample_latents

RANK = 64
WAYS = {"30 steps, guidance 4": (30, 4.0), "8 steps with LoRA": (8, 1.0), "4 steps with LoRA": (4, 1.0)}
HEAD = "| weights | side | memory | tokens | picture | seconds | peak allocated GiB | few-step LoRA GiB |"


def few_step_lora(transformer: Any) -> dict[str, AdapterPart]:
    """Random weight changes of all linear layers in the blocks, in host memory."""
    parts: dict[str, AdapterPart] = {}
    for name, layer in transformer.named_modules():
        if isinstance(layer, nn.Linear) and name.startswith("transformer_blocks.") and "lora_" not in name:
            down = torch.randn(RANK, layer.in_features, dtype=torch.bfloat16)
            up = torch.randn(layer.out_features, RANK, dtype=torch.bfloat16)
            parts[name.removesuffix(".base_layer")] = LowRank(down, up, 1e-4)
    return parts


def seconds_of(transformer: Any, way: str, given: list[Any], side: int, lora: Mapping[str, AdapterPart]) -> float:
    """Seconds until the device has drawn one picture."""
    steps, guidance = WAYS[way]
    device = given[0].prompt_embeds.device
    noise = torch.randn(1, 16, side, side, device=device)
    few = guidance == 1.0
    wait(device)
    began = time.perf_counter()
    with with_second_lora(transformer, lora, 1.0, device) if few else nullcontext():
        sample_latents(
            transformer,
            noise,
            given[0],
            scheduler=ComfySchedule(3.0) if few else load_scheduler(Path("none")),
            num_steps=steps,
            guidance=guidance,
            negative=given[1],
        )
        wait(device)
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, nargs="+", default=[1024, 512])
    parser.add_argument("--precision", nargs="+", default=["int8-quanto"])
    parser.add_argument("--memory", nargs="+", default=["full"])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.layers} blocks")
    print(HEAD)
    print(f"|{' --- |' * (HEAD.count('|') - 1)}", flush=True)
    for precision in arguments.precision:
        for memory in arguments.memory:
            setting = Setting("ours", precision, arguments.side[0], 1, memory)
            transformer, _ = our_step(setting, arguments.layers, device)
            lora = few_step_lora(transformer)
            size = second_lora_bytes(lora, 2) / GIB
            with without_dropout(transformer), exact_products(transformer):
                for pixels in arguments.side:
                    side = pixels // 8
                    given = conditions(side, 1, 12, device)
                    for way in WAYS:
                        if device.type == "cuda":
                            torch.cuda.reset_peak_memory_stats()
                        found = [seconds_of(transformer, way, given, side, lora) for _ in range(arguments.repeats)]
                        peak = torch.cuda.max_memory_allocated() / GIB if device.type == "cuda" else 0.0
                        tokens = 2 * (side // 2) ** 2 + PROMPT_TOKENS
                        lora_size = f"{size:.2f}" if WAYS[way][1] == 1.0 else "-"
                        print(
                            f"| {precision} | {pixels} | {memory} | {tokens} | {way} | {statistics.median(found):.1f} "
                            f"| {peak:.2f} | {lora_size} |",
                            flush=True,
                        )
            del transformer
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
