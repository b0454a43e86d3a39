"""Seconds and memory of a training step of the full-size transformer (20 B parameters, random weights).

    python benchmarks/gpu_step.py --layers 60 --device cuda

One row per setting. `ours` is the trainer's step. `plain` is the baseline: the same step written like the examples of
diffusers and peft, with autocast, their checkpointing and the layers of quanto and bitsandbytes. Weights are drawn and
quantised block by block, so the whole network is in bf16 only if that is the chosen precision. Each `--memory` is a
comma-separated list: `full` or `none` (gradient checkpointing of all or no blocks), `blocks=40`, `stream=60`,
`buffers=3`, `offload`, `compile`, `8bit` (`matmul_precision`). Seconds are the median of the timed steps, TFLOP/s come
from `flops`, and peak bytes from torch's allocator.
"""

from __future__ import annotations

import argparse
import gc
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.full_size_step import (
    GIB,
    PROMPT_TOKENS,
    RANK,
    Setting,
    Step,
    build,
    our_step,
    planned_bytes,
    planned_run,
)
from trainer_core.adapters.plan import TARGET_PATTERNS
from trainer_core.memory.placement import recomputed_blocks
from trainer_core.planning.duration import probed_speed, training_seconds
from trainer_core.planning.operations import training_operations
from trainer_core.qwen_image.transformer import predict_velocity
from trainer_core.qwen_image.types import Condition

HEAD = (
    "| step | weights | side | references | prompt | memory | s/step | estimated s | TFLOP/s | of peak | weights GiB "
    "| peak allocated GiB | planned GiB | peak reserved GiB | host GiB | built in s |"
)


def plain_step(setting: Setting, layers: int, device: torch.device) -> tuple[Any, Step]:
    """The transformer and a training step as in diffusers' examples."""
    import peft

    transformer = build(setting, layers, device, ())
    transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGET_PATTERNS["image-attention"]))
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    if setting.config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def step(latents: Tensor, condition: Condition) -> None:
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(1, device=device))
        noisy = (1 - sigma) * latents + sigma * noise
        with torch.autocast(device.type, torch.bfloat16):
            velocity = predict_velocity(transformer, noisy, sigma, condition)
        (velocity.float() - (noise - latents)).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return transformer, step


def flops(setting: Setting, layers: int, width: int = 3072) -> float:
    """Floating point operations of a step, from its matrix products."""
    image = (setting.side // 16) ** 2 * (1 + setting.references)
    config = setting.config
    again = recomputed_blocks(config.memory, layers, checkpointing=config.gradient_checkpointing)
    return training_operations(width, image + setting.prompt_tokens, layers, again)


def measure(setting: Setting, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Measure a setting. Returns the figures of its row."""
    began = time.perf_counter()
    _transformer, step = (our_step if setting.step == "ours" else plain_step)(setting, arguments.layers, device)
    wait(device)
    built, weights = time.perf_counter() - began, allocated(device)
    latents, condition = setting.inputs(device)
    seconds = []
    for number in range(arguments.warmup + arguments.steps):
        if number == arguments.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(device)
        began = time.perf_counter()
        step(latents, condition)
        wait(device)
        seconds.append(time.perf_counter() - began)
    if arguments.profile:
        profile(lambda: step(latents, condition), device)
    median = statistics.median(seconds[arguments.warmup :])
    cuda = device.type == "cuda"
    return {
        "built": built,
        "weights": weights,
        "seconds": median,
        "estimated": estimated_seconds(setting, arguments.layers, device),
        "tflops": flops(setting, arguments.layers) / median / 1e12,
        "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "planned": planned_bytes(setting, arguments.layers),
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
        "host": host_bytes(),
    }


def estimated_seconds(setting: Setting, layers: int, device: torch.device) -> float:
    """What the planner estimates for the step "ours" before anything is loaded; NaN on other devices than CUDA."""
    config, network, work = planned_run(setting, layers)
    speed = probed_speed(config, network, work, device)
    tokens = work.tokens.image + work.tokens.text
    return math.nan if speed is None else training_seconds(config, network, speed, tokens)


def profile(step: Callable[[], None], device: torch.device) -> None:
    """Print the device time of one step by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    with profiler(activities=[ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]) as found:
        step()
        wait(device)
    order = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=24, max_name_column_width=70))


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def host_bytes() -> int:
    """Resident memory of this process now, or its peak on systems without /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bf16_peak(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix product on this device, which the table takes as the peak."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(8):
        wait(device)
        began = time.perf_counter()
        a @ b
        wait(device)
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[3:]) / 1e12


def arguments_of_the_command() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--side", type=int, nargs="+", default=[1024])
    parser.add_argument("--references", type=int, nargs="+", default=[1])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[PROMPT_TOKENS])
    parser.add_argument("--precision", nargs="+", default=["none", "int8-quanto", "nf4-bnb"])
    parser.add_argument("--memory", nargs="+", default=["full"])
    parser.add_argument("--step", nargs="+", default=["plain", "ours"], choices=["plain", "ours"])
    parser.add_argument("--seconds", type=float, default=1e9, help="Start no further setting after this time.")
    parser.add_argument("--profile", action="store_true", help="Also print the kernels of one step.")
    return parser.parse_args()


def main() -> None:
    arguments, began = arguments_of_the_command(), time.perf_counter()
    device = torch.device(arguments.device)
    peak = bf16_peak(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, {arguments.layers} blocks, rank {RANK}, bf16 peak {peak:.1f} TFLOP/s")
    print(HEAD)
    print(f"|{' --- |' * (HEAD.count('|') - 1)}", flush=True)
    settings = [
        Setting(step, precision, side, references, memory, prompt_tokens=prompt)
        for precision in arguments.precision
        for side in arguments.side
        for references in arguments.references
        for prompt in arguments.prompt_tokens
        for memory in arguments.memory
        for step in arguments.step
        if step == "ours" or memory in ("full", "none")
    ]
    for setting in settings:
        if time.perf_counter() - began > arguments.seconds:
            print("stopped: --seconds have passed", flush=True)
            return
        print_row(setting, arguments, device, peak)


def print_row(setting: Setting, arguments: argparse.Namespace, device: torch.device, peak: float) -> None:
    """Measure a setting and print its row."""
    values = setting.step, setting.precision, setting.side, setting.references, setting.prompt_tokens, setting.memory
    label = f"| {' | '.join(map(str, values))} |"
    try:
        got = measure(setting, arguments, device)
        print(
            f"{label} {got['seconds']:.3f} | {got['estimated']:.3f} | {got['tflops']:.0f} | {got['tflops'] / peak:.0%} "
            f"| {got['weights'] / GIB:.2f} | {got['allocated'] / GIB:.2f} | {got['planned'] / GIB:.2f} "
            f"| {got['reserved'] / GIB:.2f} | {got['host'] / GIB:.1f} | {got['built']:.0f} |",
            flush=True,
        )
    except torch.OutOfMemoryError:
        print(f"{label} out of memory |", flush=True)
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
