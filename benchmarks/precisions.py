"""Accuracy of each format of the frozen weights: error of the output, and direction of the adapter's gradient.

    python benchmarks/precisions.py

Writes one block of Qwen-Image at full width (380 M parameters) with random bf16 weights, and loads it with the trainer
in every `base_model_precision`. Arithmetic is float32, so that only the format matters. The error is the norm of the
velocity's difference divided by the velocity's norm. The cosine compares the gradients of an adapter (rank 16, all
layers) as one vector. Random weights have no outliers, so int8 and fp8 look slightly better than with trained weights.

The second table is for `text_encoder_precision`: the error of the last hidden state of one layer of Qwen2.5-VL-7B at
full width on 64 random tokens.
"""

from __future__ import annotations

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support import layouts
from trainer_core.adapters.inject import inject_lora
from trainer_core.adapters.plan import plan_adapter
from trainer_core.config import LoraConfig, ModelConfig
from trainer_core.config.model import EIGHT_BITS
from trainer_core.events import SILENT
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.qwen_image.text_encoder_file import load_by_layers, qwen25_vl_7b
from trainer_core.qwen_image.transformer import load_transformer, predict_velocity
from trainer_core.qwen_image.types import Condition
from trainer_core.rng import stream

TOKENS = 1000  # vocabulary size of the small text encoder
BOTH = " + quantize_activations"
QUANTISED = ("int8-quanto", "fp8-quanto", "nf4-bnb", "int4-quanto", "int2-quanto")
FILES = {
    "fp8": layouts.plain_fp8,
    "fp8 scaled": layouts.older_fp8,
    "int8": layouts.int8,
    "int8 rotated": layouts.rotated_int8,
}


def measure(
    path: Path, precision: str, device: torch.device, *, activations: bool = False
) -> tuple[Tensor, Tensor, float]:
    """Load a file and run forward and backward. Returns the velocity, the gradient and the seconds of loading."""
    config = ModelConfig(
        transformer_file=str(path), text_encoder_file=str(path), vae_file=str(path), tokenizer="none",
        base_model_precision=precision, mixed_precision="no", device=str(device),
        quantize_activations=activations,
    )  # fmt: skip
    start = time.monotonic()
    network = load_transformer(BaseModel(config), device)
    seconds = time.monotonic() - start
    lora = inject_lora(network, plan_adapter(network, LoraConfig(lora_rank=16, lora_targets="all")), seed=0)
    for name, weight in lora.items():
        if name.endswith("lora_B"):
            weight.data.copy_(torch.randn(weight.shape, generator=stream(0, name)) * 0.02)
    draws = stream(0, "precisions")
    latents, wanted = (torch.randn(1, 16, 32, 32, generator=draws).to(device) for _ in range(2))
    prompt, sigma = torch.randn(1, 64, 3584, generator=draws).to(device), torch.tensor([0.6], device=device)
    velocity = predict_velocity(network, latents, sigma, Condition((latents * 0.5,), prompt))
    (velocity - wanted).square().mean().backward()
    gradient = torch.cat([weight.grad.flatten() for weight in lora.values() if weight.grad is not None])
    return velocity.detach().cpu(), gradient.cpu(), seconds


def rows(device: torch.device) -> Iterator[str]:
    """Lines of the table for base_model_precision."""
    yield "| file | base_model_precision | output error | gradient cosine | loading, s |"
    yield "| --- | --- | --- | --- | --- |"
    weights = layouts.random_weights({"num_layers": 1})
    with tempfile.TemporaryDirectory() as folder:
        path = layouts.bf16(weights, Path(folder) / "bf16.safetensors")
        exact, direction, seconds = measure(path, "none", device)
        yield f"| bf16 | none | 0 | 1 | {seconds:.1f} |"
        cases = [("bf16", path, precision) for precision in (*QUANTISED, *(f"{each}{BOTH}" for each in EIGHT_BITS))]
        cases += [(name, Path(folder) / f"{name}.safetensors", "file") for name in FILES]
        for name, file, precision in cases:
            if precision == "file":
                FILES[name](weights, file)
            found = measure(file, precision.removesuffix(BOTH), device, activations=precision.endswith(BOTH))
            velocity, gradient, seconds = found
            error = float((velocity - exact).norm() / exact.norm())
            cosine = float(torch.cosine_similarity(gradient.double(), direction.double(), dim=0))
            yield f"| {name} | {precision} | {error:.1e} | {cosine:.5f} | {seconds:.1f} |"
            if precision == "file":
                file.unlink()
            gc.collect()


def text_encoder_rows(device: torch.device) -> Iterator[str]:
    """Lines of the table for text_encoder_precision."""
    yield "| text_encoder_precision | output error |"
    yield "| --- | --- |"
    ids = torch.randint(0, TOKENS, (1, 64), generator=stream(0, "ids")).to(device)
    with tempfile.TemporaryDirectory() as folder:
        write_text_encoder(Path(folder))
        exact: Tensor | None = None
        for precision in ("none", *QUANTISED):
            config = ModelConfig(text_encoder_precision=precision, device=str(device))
            network = load_by_layers(config, Path(folder), torch.float32, device, SILENT)
            with torch.no_grad():
                hidden = network.model.language_model(input_ids=ids, use_cache=False).last_hidden_state.cpu()
            exact = hidden if exact is None else exact
            yield f"| {precision} | {float((hidden - exact).norm() / exact.norm()):.1e} |"
            del network
            gc.collect()


def write_text_encoder(folder: Path) -> None:
    """Write a text encoder with one layer and one vision block at full width, TOKENS words and random bf16 weights."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    settings = qwen25_vl_7b()
    settings["text_config"] |= {"num_hidden_layers": 1, "vocab_size": TOKENS, "bos_token_id": 1, "eos_token_id": 2}
    settings["vision_config"] |= {"depth": 1, "fullatt_block_indexes": [0]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings))
    network.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    device = torch.device(parser.parse_args().device)
    for row in chain(rows(device), [""], text_encoder_rows(device)):
        print(row, flush=True)


if __name__ == "__main__":
    main()
