"""Seconds and memory of a training step of the full-size transformer (20 B parameters, random weights).

    python benchmarks/gpu_step.py --layers 60 --device cuda

One row per setting. `plain` is the same step written directly with diffusers and peft, in the same run: the peer to
beat. Weights are drawn block by block and quantised at once, so the bf16 network is never held whole unless it is the
wanted precision. Figures: median seconds of the timed steps; TFLOP/s from the matrix products counted below; peak
bytes as torch's allocator reports them.
"""

from __future__ import annotations

import argparse
import gc
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

sys.path.insert(0, str(Path(__file__).parent.parent))

from trainer_core.config import LoraConfig, NoiseConfig, OptimizerConfig
from trainer_core.events import SILENT
from trainer_core.precision.quantise import quantise
from trainer_core.qwen_image.transformer import predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.training.lora import inject_lora
from trainer_core.training.lora_plan import TARGET_PATTERNS
from trainer_core.training.objective import add_noise, velocity_loss
from trainer_core.training.optimizer import build_optimizer

GIB = 2**30
PROMPT_TOKENS = 230  # edit-v2 with one reference: 196 vision tokens and a sentence
RANK = 16


@dataclass(frozen=True)
class Setting:
    """One row."""

    step: str  # ours or plain
    precision: str
    side: int
    references: int
    checkpointing: bool


def build(precision: str, layers: int, device: torch.device) -> Any:
    """A frozen transformer with random weights, in `precision` on `device`."""
    from diffusers import QwenImageTransformer2DModel

    with torch.device("meta"):
        transformer = QwenImageTransformer2DModel(num_layers=layers).bfloat16()
    transformer.requires_grad_(False)
    blocks = list(transformer.transformer_blocks)
    for index, block in enumerate(blocks):
        draw(block, device)
        holder = nn.ModuleList([block])
        quantise(holder, precision, (), device, SILENT)
        transformer.transformer_blocks[index] = holder[0]
    transformer.transformer_blocks = nn.ModuleList()
    draw(transformer, device)
    transformer.transformer_blocks = nn.ModuleList(blocks)
    from diffusers.models.transformers.transformer_qwenimage import QwenEmbedRope

    transformer.pos_embed = QwenEmbedRope(theta=10000, axes_dim=[16, 56, 56], scale_rope=True)
    return transformer.eval()


def draw(module: nn.Module, device: torch.device) -> None:
    """Random weights of a trained network's order of size, drawn on the device."""
    module.to_empty(device=device)
    for name, weight in module.named_parameters():
        if weight.ndim > 1:
            weight.data.normal_(std=0.02)
        else:
            weight.data.fill_(1.0 if "norm" in name else 0.0)


def our_step(transformer: Any, setting: Setting, device: torch.device) -> Callable[[Tensor, Condition], None]:
    """The product's step: its adapter, objective, forward and optimizer."""
    lora = inject_lora(transformer, LoraConfig(lora_rank=RANK), seed=0)
    if setting.checkpointing:
        transformer.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
    optimizer = build_optimizer(lora, OptimizerConfig())

    def step(latents: Tensor, condition: Condition) -> None:
        noisy = add_noise(latents, NoiseConfig(), 0, [0])
        with torch.autocast(device.type, torch.bfloat16):
            velocity = predict_velocity(transformer, noisy.latents, noisy.sigma, condition)
        velocity_loss(velocity, noisy.target_velocity).sum().backward()
        nn.utils.clip_grad_norm_(lora.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def plain_step(transformer: Any, setting: Setting, device: torch.device) -> Callable[[Tensor, Condition], None]:
    """The step as diffusers' training examples write it."""
    import peft

    transformer.add_adapter(peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGET_PATTERNS["image-attention"]))
    weights = [weight for weight in transformer.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    if setting.checkpointing:
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

    return step


def flops(setting: Setting, layers: int, width: int = 3072) -> float:
    """Matrix products of a step: linear layers forward, again for the gradient to their input (frozen weights have
    none of their own), and once more when recomputed; attention counts 2 products forward and 4 (5 with
    FlashAttention's own recomputation, not counted) backward. The adapter's own are under 1 %."""
    image = (setting.side // 16) ** 2 * (1 + setting.references)
    text = PROMPT_TOKENS
    linear = 2 * (image + text) * (4 * width * width + 8 * width * width)
    attention = 4 * (image + text) ** 2 * width
    passes = 2 + setting.checkpointing
    return layers * (linear * passes + attention * (passes + 1))


def measure(setting: Setting, arguments: argparse.Namespace, device: torch.device) -> dict[str, float]:
    """Seconds, bytes and rate of a setting."""
    began = time.perf_counter()
    transformer = build(setting.precision, arguments.layers, device)
    wait(device)
    built = time.perf_counter() - began
    weights = allocated(device)
    step = (our_step if setting.step == "ours" else plain_step)(transformer, setting, device)
    latent = setting.side // 8
    latents = torch.randn(1, 16, latent, latent, device=device)
    references = tuple(torch.randn(1, 16, latent, latent, device=device) for _ in range(setting.references))
    condition = Condition(references, torch.randn(1, PROMPT_TOKENS, 3584, device=device))
    seconds = []
    for number in range(arguments.warmup + arguments.steps):
        if number == arguments.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        wait(device)
        began = time.perf_counter()
        step(latents, condition)
        wait(device)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[arguments.warmup :])
    cuda = device.type == "cuda"
    return {
        "build": built,
        "weights": weights,
        "seconds": median,
        "tflops": flops(setting, arguments.layers) / median / 1e12,
        "allocated": torch.cuda.max_memory_allocated() if cuda else 0,
        "reserved": torch.cuda.max_memory_reserved() if cuda else 0,
    }


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def bf16_peak(device: torch.device) -> float:
    """TFLOP/s of a large bf16 matrix product here: the ceiling that shares are taken of."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=60)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--side", type=int, nargs="+", default=[1024])
    parser.add_argument("--references", type=int, nargs="+", default=[1])
    parser.add_argument("--precision", nargs="+", default=["none", "int8-quanto", "nf4-bnb"])
    parser.add_argument("--checkpointing", nargs="+", default=["on"], choices=["on", "off"])
    parser.add_argument("--step", nargs="+", default=["plain", "ours"], choices=["plain", "ours"])
    parser.add_argument("--seconds", type=float, default=1e9, help="Begin no setting after so long.")
    arguments = parser.parse_args()
    device, began = torch.device(arguments.device), time.perf_counter()
    peak = bf16_peak(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}, torch {torch.__version__}, {arguments.layers} blocks, rank {RANK}, bf16 peak {peak:.1f} TFLOP/s")
    print(
        "| step | precision | side | references | checkpointing | s/step | TFLOP/s | of peak "
        "| weights GiB | peak allocated GiB | peak reserved GiB | built in s |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |", flush=True)
    for precision in arguments.precision:
        for side in arguments.side:
            for references in arguments.references:
                for checkpointing in arguments.checkpointing:
                    for step in arguments.step:
                        if time.perf_counter() - began > arguments.seconds:
                            print("out of time", flush=True)
                            return
                        row(Setting(step, precision, side, references, checkpointing == "on"), arguments, device, peak)


def row(setting: Setting, arguments: argparse.Namespace, device: torch.device, peak: float) -> None:
    """Measure and print a setting."""
    label = (
        f"| {setting.step} | {setting.precision} | {setting.side} | {setting.references} "
        f"| {'on' if setting.checkpointing else 'off'} |"
    )
    try:
        got = measure(setting, arguments, device)
        print(
            f"{label} {got['seconds']:.3f} | {got['tflops']:.0f} | {got['tflops'] / peak:.0%} "
            f"| {got['weights'] / GIB:.2f} | {got['allocated'] / GIB:.2f} | {got['reserved'] / GIB:.2f} "
            f"| {got['build']:.0f} |",
            flush=True,
        )
    except torch.OutOfMemoryError:
        print(f"{label} out of memory |", flush=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    main()
