"""A LoRA that is used together with another one: `python -m benchmarks.frozen_lora --tokenizer FOLDER`.

Another LoRA (the demo edit `sketch`) is part of the model in use. The edit `negative` is learned with it frozen in the
model (`frozen_loras`), and without. Prints a Markdown table: PSNR of held-out pictures as mean ± standard deviation
over seeds.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from trainer_core.job import encode_job

from .demo_edits import Training, job_of, mean_and_spread, run, write_sets

EDIT = "negative"
_UNCHANGED = {"max_train_steps": 1, "optimizer": {"learning_rate": 1e-12, "lr_warmup_steps": 0}}


def run_dir(folder: Path, tokenizer: Path, training: Training) -> Path:
    """The run folder of a training."""
    return Path(job_of(folder, training, tokenizer).run_dir)


def lora_of(folder: Path, tokenizer: Path, training: Training) -> str:
    """The LoRA file of a finished training."""
    place = run_dir(folder, tokenizer, training)
    return str(place / f"{place.name}.safetensors")


def outcomes(folder: Path, tokenizer: Path, other: str, seed: int) -> dict[str, float]:
    """dB of the model in use (with the other LoRA), and of the edit's LoRA in three ways."""
    frozen: dict[str, Any] = {"model": {"frozen_loras": [{"file": other}]}}
    with_it = run(folder, tokenizer, Training("frozen", EDIT, seed, frozen, with_old=False))
    alone = Training("alone", EDIT, seed, {}, with_old=False)
    without = run(folder, tokenizer, alone)
    start = {"lora": {"init_lora": lora_of(folder, tokenizer, alone)}}
    together = run(
        folder, tokenizer, Training("together", EDIT, seed, {**_UNCHANGED, **frozen, **start}, with_old=False)
    )
    return {
        "no LoRA of the edit": with_it.base[EDIT],
        "trained without the other": together.lora[EDIT],
        "trained with the other frozen": with_it.lora[EDIT],
        "trained and used without the other": without.lora[EDIT],
    }


def main() -> None:
    """Train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Qwen2.5 tokenizer")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sets(folder)
        other = Training("other", "sketch", 0, with_old=False)
        run(folder, options.tokenizer, other)
        encode_job(job_of(folder, Training("frozen", EDIT, 0, with_old=False), options.tokenizer))
        one = partial(outcomes, folder, options.tokenizer, lora_of(folder, options.tokenizer, other))
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            found = list(pool.map(one, range(options.seeds)))
    print(f"| LoRA of the edit, used together with another | {EDIT}, dB |\n| --- | --- |")
    for row in found[0]:
        print(f"| {row} | {mean_and_spread(each[row] for each in found)} |")


if __name__ == "__main__":
    main()
