"""Seconds and memory of the full-size VAE (random weights), whole and in tiles.

    python benchmarks/decoding.py --device cuda

One row per picture, direction and largest tile. `tile` is its side in latents without the margin; `whole` is the
picture in one piece. `planned` is the planner's figure for it. `difference` is the largest one from the whole picture,
divided by the whole picture's largest value.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from trainer_core.qwen_image import vae_tiles
from trainer_core.qwen_image.vae import for_pictures
from trainer_core.qwen_image.vae_tiles import decode_raw, encode_raw

HEAD = "| picture | direction | tile | seconds | peak MiB | planned MiB | difference |"
MIB = 2**20


def timed(call: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, float, int]:
    """The result, seconds of the second call, and peak bytes above those before it."""
    cuda = device.type == "cuda"
    call()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    result = call()
    if cuda:
        torch.cuda.synchronize()
    return result, time.perf_counter() - began, (torch.cuda.max_memory_allocated() if cuda else 0) - before


def planned(direction: str, side: int, tile: int, element_bytes: int) -> int:
    """Working memory of a square picture of `side` latents in tiles of at most `tile`."""
    decodes = direction == "decode"
    margin = vae_tiles._DECODING_MARGIN if decodes else vae_tiles._ENCODING_MARGIN
    elements = vae_tiles.DECODING_ELEMENTS if decodes else vae_tiles.ENCODING_ELEMENTS
    in_tile = elements * vae_tiles._largest_tile(side, side, tile, margin) * 64
    whole = side * side * 64
    return element_bytes * max(
        vae_tiles.MIDDLE_ELEMENTS * whole, in_tile + vae_tiles._FEATURE_ELEMENTS * whole * (tile < side)
    )


@torch.no_grad()
def main() -> None:
    from diffusers import AutoencoderKLQwenImage

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--side", type=int, nargs="+", default=[1024, 2048])
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    vae = AutoencoderKLQwenImage().eval().requires_grad_(False)
    for_pictures(vae)
    vae = vae.to(device, dtype)
    print(f"{torch.cuda.get_device_name() if device.type == 'cuda' else 'CPU'}, torch {torch.__version__}, {dtype}")
    print(HEAD)
    print(f"|{' --- |' * (HEAD.count('|') - 1)}", flush=True)
    sides = vae_tiles._SIDES
    for pixels in arguments.side:
        side = pixels // 8
        inputs = {
            "decode": (decode_raw, torch.randn(1, 16, 1, side, side, device=device, dtype=dtype)),
            "encode": (encode_raw, torch.rand(1, 3, 1, pixels, pixels, device=device, dtype=dtype)),
        }
        for direction, (run, x) in inputs.items():
            whole = None
            for tile in (side, *(each for each in sides if each < side)):
                vae_tiles._SIDES = (tile,)
                vae_tiles.free_bytes = lambda _, tile=tile, side=side: 2**62 if tile == side else 0
                found, seconds, peak = timed(lambda run=run, x=x: run(vae, x), device)
                whole = found if whole is None else whole
                difference = float((found.float() - whole.float()).abs().max() / whole.float().abs().max())
                name = "whole" if tile == side else tile
                print(
                    f"| {pixels} x {pixels} | {direction} | {name} | {seconds:.3f} | {peak / MIB:.0f} "
                    f"| {planned(direction, side, tile, dtype.itemsize) / MIB:.0f} | {difference:.1e} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
