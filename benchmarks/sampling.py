"""Seconds per sampling step with guidance: its two passes one after the other, or as one batch.

    python benchmarks/sampling.py --layers 60 --device cuda

The full-size transformer with random weights and an adapter, set up as in training (`--memory` as in gpu_step.py). One
row per way: `two passes`; `one batch` with prompts of unequal length, which attention masks; `one batch, equal` without
a mask. `first` is the seconds of the first picture less those of a later one, which is mostly compilation. `waits`
counts how often a step waits for the device (CUDA only). `tokens` are those of one pass.
sampling.TOGETHER_TOKENS is the highest number of tokens at which uncompiled blocks use one batch.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.full_size_step import GIB, PROMPT_TOKENS, Setting, our_step
from trainer_core.adapters.inject import without_dropout
from trainer_core.qwen_image.sampling import load_scheduler, sample_latents
from trainer_core.qwen_image.types import Condition

SHORTER = 12  # tokens that a negative prompt has less than a caption
WAYS = {"two passes": (False, SHORTER), "one batch": (True, SHORTER), "one batch, equal": (True, 0)}
HEAD = "| weights | side | references | memory | tokens | passes | s/step | first | peak allocated GiB | waits |"


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def conditions(side: int, references: int, shorter: int, device: torch.device) -> list[Condition]:
    """Of the prompt and the negative prompt, at a picture's side in latents."""
    pictures = tuple(torch.randn(1, 16, side, side, device=device) for _ in range(references))
    lengths = PROMPT_TOKENS, PROMPT_TOKENS - shorter
    return [Condition(pictures, torch.randn(1, length, 3584, device=device)) for length in lengths]


def draw(transformer: Any, side: int, given: list[Condition], steps: int, *, together: bool) -> float:
    """Sample one picture. Returns the seconds until the device is done."""
    device = given[0].prompt_embeds.device
    noise = torch.randn(1, 16, side, side, device=device)
    wait(device)
    began = time.perf_counter()
    sample_latents(
        transformer,
        noise,
        given[0],
        scheduler=load_scheduler(Path("none")),
        num_steps=steps,
        guidance=4.0,
        negative=given[1],
        together=together,
    )
    wait(device)
    return time.perf_counter() - began


def waits_per_step(picture: Callable[[int], float], device: torch.device) -> str:
    """How often a sampling step waits for the device, as torch reports it. `picture`: samples one in so many steps."""
    if device.type != "cuda":
        return "-"
    counts = []
    for steps in (2, 5):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            picture(steps)
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum("synchronizing" in str(each.message) for each in caught))
    return f"{(counts[1] - counts[0]) / 3:g}"


def arguments_of_the_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--side", type=int, nargs="+", default=[512, 768, 1024])
    parser.add_argument("--references", type=int, default=1)
    parser.add_argument("--precision", nargs="+", default=["int8-quanto", "nf4-bnb"])
    parser.add_argument("--memory", nargs="+", default=["full"])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def main() -> None:
    arguments = arguments_of_the_command()
    device = torch.device(arguments.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, {arguments.layers} blocks")
    print(HEAD)
    print(f"|{' --- |' * (HEAD.count('|') - 1)}", flush=True)
    for precision in arguments.precision:
        for memory in arguments.memory:
            setting = Setting("ours", precision, arguments.side[0], arguments.references, memory)
            transformer, _ = our_step(setting, arguments.layers, device)
            with without_dropout(transformer):
                for pixels in arguments.side:
                    print_rows(transformer, pixels, f"| {precision} | {pixels} |", memory, arguments)
            del transformer
            torch.compiler.reset()
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def print_rows(transformer: Any, pixels: int, label: str, memory: str, arguments: argparse.Namespace) -> None:
    """Measure each way at one size, and print a row for it."""
    side, device = pixels // 8, torch.device(arguments.device)
    tokens = (1 + arguments.references) * (side // 2) ** 2 + PROMPT_TOKENS
    for way, (together, shorter) in WAYS.items():
        given = conditions(side, arguments.references, shorter, device)
        row = f"{label} {arguments.references} | {memory} | {tokens} | {way} |"
        picture = partial(draw, transformer, side, given, together=together)
        try:
            first = picture(arguments.steps)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seconds = statistics.median(picture(arguments.steps) for _ in range(arguments.repeats))
            peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
            print(
                f"{row} {seconds / arguments.steps:.3f} | {first - seconds:.1f} | {peak / GIB:.2f} "
                f"| {waits_per_step(picture, device)} |",
                flush=True,
            )
        except torch.OutOfMemoryError:
            print(f"{row} out of memory |", flush=True)


if __name__ == "__main__":
    main()
