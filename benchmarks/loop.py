"""Overhead of the training loop beyond the network's own work: `python -m benchmarks.loop --tokenizer FOLDER`.

Prints a Markdown table: the time of the loop's step relative to a bare forward, backward and optimizer step of the same
transformer on tensors of the same shapes, measured alternately in one process; the memory growth over a long run; and
pairs encoded per second. loop_cpu_2026-11.md has results and the machine they were measured on.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from tests.support.loop_cost import (
    WARM_UP,
    encode,
    measure_memory,
    measure_overhead,
    train_config,
)
from tests.support.narrow import fill, make_base, small_encoding
from tools.pretrain_demo.transformer import CONFIG as DEMO_TRANSFORMER
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import EncodedDataset
from trainer_core.config import (
    ModelConfig,
)
from trainer_core.data.pairing import pair_folders
from trainer_core.qwen_image.base_model import BaseModel


def demo_sized_base(folder: Path, tokenizer: Path) -> ModelConfig:
    """A base model whose transformer has the demo model's size."""
    from diffusers import QwenImageTransformer2DModel

    model = make_base(folder, tokenizer)
    transformer = QwenImageTransformer2DModel(**DEMO_TRANSFORMER)
    fill(transformer, 0)
    transformer.save_pretrained(folder / "transformer")
    return model


def report(work: Path, tokenizer: Path, resolution: int, steps: int, long_steps: int) -> str:
    """Measure everything. Returns the Markdown table."""
    model = demo_sized_base(work / "base", tokenizer)
    encoded, encode_seconds = encode(work, model, resolution=resolution, pairs=(pairs := 24))
    _, again_seconds = encode_again(work, model, resolution)
    overhead = measure_overhead(train_config(work / "runs/overhead", encoded, model, steps + WARM_UP))
    small = work / "small"
    narrow = make_base(small / "base", tokenizer)
    small_encoded, _ = encode(small, narrow, resolution=96, pairs=6)
    every = max(1, long_steps // 10)
    looks = measure_memory(train_config(small / "run", small_encoded, narrow, long_steps), every)
    first, last = looks[1], looks[-1]
    bare = statistics.median(overhead.bare)
    rows = [
        ("bare step, median", f"{bare * 1000:.1f} ms"),
        ("loop step, median", f"{statistics.median(overhead.loop) * 1000:.1f} ms"),
        (f"loop / bare, medians of {len(overhead.loop)} alternating steps", f"{overhead.ratio:.3f}"),
        ("loop / bare, CPU time", f"{overhead.cpu_ratio:.3f}"),
        ("loop / bare, means of the fastest tenths", f"{overhead.ratio_of_fastest:.3f}"),
        (
            f"resident memory, steps {first.step} to {last.step}",
            f"{(last.resident_bytes - first.resident_bytes) / 2**20:+.1f} MiB of {last.resident_bytes / 2**20:.0f}",
        ),
        (f"Python objects, steps {first.step} to {last.step}", f"{last.objects - first.objects:+d} of {last.objects}"),
        (f"tensors, steps {first.step} to {last.step}", f"{last.tensors - first.tensors:+d} of {last.tensors}"),
        (f"encoding {pairs} pairs of {resolution} px, loading included", f"{pairs / encode_seconds:.1f} pairs/s"),
        ("encoding them again, with all in the cache", f"{pairs / again_seconds:.0f} pairs/s"),
    ]
    return "\n".join(["| measured | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows)])


def encode_again(work: Path, model: ModelConfig, resolution: int) -> tuple[EncodedDataset, float]:
    """Encode the same data set again, from the cache. Returns it and the seconds."""
    from trainer_core.config import DatasetConfig

    folders = DatasetConfig(target_dir=str(work / "pairs/target"), reference_dirs=(str(work / "pairs/reference_1"),))
    dataset = pair_folders(folders)
    began = time.perf_counter()
    encoding = small_encoding(resolution=resolution, num_eval_images=0)
    return encode_dataset(dataset, BaseModel(model), encoding, work / "cache"), time.perf_counter() - began


def versions() -> str:
    """The machine and the versions of the packages."""
    import diffusers
    import peft
    import transformers

    packages = ", ".join(f"{each.__name__} {each.__version__}" for each in (torch, diffusers, transformers, peft))
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; {packages}"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="comfy/text_encoders/qwen25_tokenizer")
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--long-steps", type=int, default=500)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        table = report(Path(work), arguments.tokenizer, arguments.resolution, arguments.steps, arguments.long_steps)
    print(versions())
    print()
    print(table)


if __name__ == "__main__":
    main()
