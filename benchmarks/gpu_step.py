"""Seconds and memory of a training step of the full-size transformer (20 B parameters, random weights).

    python benchmarks/gpu_step.py --layers 60 --device cuda

One row per setting. `ours` is the trainer's step. `plain` is the baseline: the same step written like the examples of
diffusers and peft, with autocast, their checkpointing and the layers of quanto and bitsandbytes. Weights are drawn and
quantised block by block, so the whole network is in bf16 only if that is the chosen precision. Each `--memory` is a
comma-separated list: `full` or `none` (gradient checkpointing of all or no blocks), `blocks=40`, `stream=60`,
`buffers=3`, `offload`, `attention` (computed again), `8bit` (`matmul_precision`), `compile`, `graph` (CUDA graphs,
whose own memory counts as reserved, not as allocated). Each `--others` is a list of other fields of Setting, as in
step_bytes.py. Seconds are the median of the timed steps, TFLOP/s come from `flops`, and peak bytes from torch's
allocator.

A row is named after its setting, for example int8-quanto/1024/full,compile. `--peer` adds the row of another program,
`--ratio` divides rows, and `--against` compares gradients:

    python benchmarks/gpu_step.py --step ours --precision none int8-quanto --memory full,compile \\
        --against none/1024/full,compile --ratio int8-quanto/1024/full,compile/none/1024/full,compile=0.75 \\
        --peer "other=python step_of_another_trainer.py" --ratio int8-quanto/1024/full,compile/other=0.48
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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.step_profile import profile_tables
from benchmarks.step_rows import (
    Gradients,
    Peer,
    adapter_gradients,
    peer_of,
    print_against,
    print_ratios,
    ratio_of,
    run_peer,
)
from tests.support.full_size_step import (
    GIB,
    PROMPT_TOKENS,
    RANK,
    OurStep,
    Setting,
    Step,
    build,
    other_fields,
    our_step,
    planned_bytes,
    planned_run,
)
from tests.support.kernel_groups import profiled
from trainer_core.adapters.plan import TARGET_PATTERNS
from trainer_core.memory.placement import recomputed_blocks, take_apart
from trainer_core.planning.duration import probed_speed, training_seconds
from trainer_core.planning.operations import training_operations
from trainer_core.qwen_image.latents import pack, token_shape
from trainer_core.qwen_image.types import Condition

COLUMNS = (
    "row",
    "s/step",
    "estimated s",
    "first step, s",
    "TFLOP/s",
    "of peak",
    "weights GiB",
    "peak allocated GiB",
    "planned GiB",
    "peak reserved GiB",
    "host GiB",
    "built in s",
)


@dataclass(frozen=True)
class Measured:
    """Figures of a setting: seconds, TFLOP/s and bytes, its gradients and the text of its profile."""

    seconds: float
    estimated: float
    first: float
    tflops: float
    weights: int
    allocated: int
    planned: int
    reserved: int
    host: int
    built: float
    gradients: Gradients | None
    profile: str


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
    optimizer, dtype = torch.optim.AdamW(weights, lr=1e-4), transformer.proj_out.weight.dtype

    def step(latents: Tensor, conditions: Sequence[Condition]) -> None:
        (condition,) = conditions
        noise = torch.randn_like(latents)
        sigma = torch.sigmoid(torch.randn(1, device=device))
        noisy = (1 - sigma) * latents + sigma * noise
        pictures = noisy, *condition.reference_latents
        tokens, target = torch.cat(list(map(pack, pictures)), dim=1), pack(noise - latents)
        with torch.autocast(device.type, torch.bfloat16):
            (velocity,) = transformer(
                hidden_states=tokens.to(dtype),
                encoder_hidden_states=condition.prompt_embeds.to(dtype),
                timestep=sigma,
                img_shapes=[list(map(token_shape, pictures))],
                return_dict=False,
            )
        (velocity[:, : target.shape[1]].float() - target).square().mean().backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return transformer, step


def flops(setting: Setting, layers: int, width: int = 3072) -> float:
    """Floating point operations of a step, from its matrix products."""
    image = (setting.side // 16) ** 2 * (1 + setting.references)
    config = setting.config
    again = recomputed_blocks(config.memory, layers, checkpointing=config.gradient_checkpointing)
    attention_again = config.memory.recompute_attention
    return training_operations(width, image + setting.prompt_tokens, layers, again, attention_again=attention_again)


def measure(setting: Setting, arguments: argparse.Namespace, device: torch.device) -> Measured:
    """Measure a setting. Weights and inputs are the same in all settings of the same sizes."""
    torch.manual_seed(0)
    began = time.perf_counter()
    transformer, step = (our_step if setting.step == "ours" else plain_step)(setting, arguments.layers, device)
    wait(device)
    built, weights = time.perf_counter() - began, allocated(device)
    torch.manual_seed(0)
    inputs = setting.inputs(device)

    def timed() -> float:
        wait(device)
        began = time.perf_counter()
        step(*inputs)
        wait(device)
        return time.perf_counter() - began

    first, *_ = (timed() for _ in range(max(1, arguments.warmup)))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    median = statistics.median(timed() for _ in range(arguments.steps))
    cuda = device.type == "cuda"
    peaks = (torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()) if cuda else (0, 0)
    work = profiled(timed, device) if arguments.profile else None
    compared = arguments.against and isinstance(step, OurStep)
    gradients = adapter_gradients(step, *inputs) if compared else None
    take_apart(transformer)  # compiled code may be freed after the next row
    return Measured(
        seconds=median,
        estimated=estimated_seconds(setting, arguments.layers, device),
        first=first,
        tflops=flops(setting, arguments.layers) / median / 1e12,
        weights=weights,
        allocated=peaks[0],
        planned=planned_bytes(setting, arguments.layers),
        reserved=peaks[1],
        host=host_bytes(),
        built=built,
        gradients=gradients,
        profile=profile_tables(work, median, setting.rank) if work else "",
    )


def estimated_seconds(setting: Setting, layers: int, device: torch.device) -> float:
    """What the planner estimates for the step "ours" before anything is loaded; NaN on other devices than CUDA."""
    config, network, work = planned_run(setting, layers)
    speed = probed_speed(config, network, work, device)
    tokens = work.tokens.image + work.tokens.text
    return math.nan if speed is None else training_seconds(config, network, speed, tokens)


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
    parser.add_argument("--others", nargs="+", default=[""], metavar="FIELD=VALUE,...")
    parser.add_argument("--step", nargs="+", default=["plain", "ours"], choices=["plain", "ours"])
    parser.add_argument("--rows", nargs="+", default=[], metavar="NAME", help="Measure only these of the rows.")
    parser.add_argument("--seconds", type=float, default=1e9, help="Start no further row after this time.")
    parser.add_argument("--profile", action="store_true", help="Also print where one step's time goes.")
    parser.add_argument("--peer", type=peer_of, action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--ratio", action="append", default=[], metavar="A/B=BAR")
    parser.add_argument("--against", default="", metavar="ROW", help="Compare the gradients of all rows with this one.")
    arguments = parser.parse_args()
    arguments.settings = settings_of(arguments)
    names = {*arguments.settings, *(peer.name for peer in arguments.peer)}
    if arguments.against and arguments.against not in arguments.settings:
        parser.error(f"--against {arguments.against} is none of these rows: {', '.join(arguments.settings)}")
    try:
        arguments.ratio = [ratio_of(text, names) for text in arguments.ratio]
    except ValueError as error:
        parser.error(str(error))
    return arguments


def settings_of(arguments: argparse.Namespace) -> dict[str, Setting]:
    """The settings to measure, by the names of their rows."""
    settings = [
        Setting(step, precision, side, references, memory, **{"prompt_tokens": prompt, **other_fields(others)})
        for precision in arguments.precision
        for side in arguments.side
        for references in arguments.references
        for prompt in arguments.prompt_tokens
        for memory in arguments.memory
        for others in arguments.others
        for step in arguments.step
        if step == "ours" or memory in ("full", "none")
    ]
    return {each.name: each for each in settings if not arguments.rows or each.name in arguments.rows}


def main() -> None:
    arguments, began = arguments_of_the_command(), time.perf_counter()
    device = torch.device(arguments.device)
    peak = bf16_peak(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, {arguments.layers} blocks, rank {RANK}, bf16 peak {peak:.1f} TFLOP/s")
    print(f"\n| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}", flush=True)
    measured: dict[str, Measured] = {}
    seconds: dict[str, float] = {}
    reserved: dict[str, float] = {}
    for name, each in {**arguments.settings, **{peer.name: peer for peer in arguments.peer}}.items():
        if time.perf_counter() - began > arguments.seconds:
            print(f"| {name} | not measured: --seconds have passed |", flush=True)
        elif isinstance(each, Peer):
            print_peer(each, seconds, reserved)
        elif got := print_row(name, each, arguments, device, peak):
            measured[name], seconds[name], reserved[name] = got, got.seconds, got.reserved
    print_ratios(arguments.ratio, seconds, reserved)
    if arguments.against:
        print_against(arguments.against, {name: got.gradients for name, got in measured.items() if got.gradients})
    for name, got in measured.items():
        if got.profile:
            print(f"\n{name}\n\n{got.profile}", flush=True)


def print_row(
    name: str, setting: Setting, arguments: argparse.Namespace, device: torch.device, peak: float
) -> Measured | None:
    """Measure a setting and print its row. None if the memory ran out."""
    got = None
    try:
        got = measure(setting, arguments, device)
    except torch.OutOfMemoryError:
        print(f"| {name} | out of memory |", flush=True)
    if got:
        print(
            f"| {name} | {got.seconds:.3f} | {got.estimated:.3f} | {got.first:.1f} | {got.tflops:.0f} "
            f"| {got.tflops / peak:.0%} | {got.weights / GIB:.2f} | {got.allocated / GIB:.2f} "
            f"| {got.planned / GIB:.2f} | {got.reserved / GIB:.2f} | {got.host / GIB:.1f} | {got.built:.0f} |",
            flush=True,
        )
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return got


def print_peer(peer: Peer, seconds: dict[str, float], reserved: dict[str, float]) -> None:
    """Run another program's step, print its row and keep its seconds per step and its reserved bytes."""
    try:
        got = run_peer(peer)
    except RuntimeError as error:
        print(f"| {peer.name} | failed |", flush=True)
        print(error, file=sys.stderr, flush=True)
        return
    shown = {"s/step": "s_per_step", "first step, s": "first", "weights GiB": "weights_gib", "built in s": "build_s"}
    shown |= {"peak allocated GiB": "peak_gib", "peak reserved GiB": "reserved_gib"}
    figures = [got.get(shown.get(column, "")) for column in COLUMNS[1:]]
    print(f"| {peer.name} | {' | '.join('-' if each is None else str(each) for each in figures)} |", flush=True)
    seconds[peer.name] = got["s_per_step"]
    if got.get("reserved_gib") is not None:
        reserved[peer.name] = got["reserved_gib"] * GIB


if __name__ == "__main__":
    main()
