"""Where a training is best, and which strength suits its LoRA: `python -m benchmarks.best_step --tokenizer FOLDER`.

Trains a demo edit for longer than it needs, on many pairs and on a few that it learns by heart, with several seeds. It
prints a Markdown table as mean ± standard deviation over seeds: PSNR of held-out pictures at the last step, at the step
that `keep_best` chooses, at the step with the lowest validation loss, and at the best step; the strength for the chosen
step by validation loss, the one that `strength_sweep` advises, and PSNR with each.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from trainer_core import results
from trainer_core.events import SampleReport, SilentObserver, StepReport
from trainer_core.job import encode_job
from trainer_core.run import train_lora
from trainer_core.training.strengths import STRENGTHS, Measured, advised, compare

from .demo_edits import Training, job_of, mean_and_spread, write_sets

FEW = 4
ROWS = {"all pairs": "negative/trained", f"{FEW} pairs": "few"}
_LONG: dict[str, Any] = {
    "max_train_steps": 360,
    "optimizer": {"lr_scheduler": "constant_with_warmup"},
    "validation": {"validation_step_interval": 30, "strength_sweep": "pictures", "num_validation_images": 4},
}
_COLUMNS = "pairs", "last step, dB", "keep_best: step", "dB", "lowest loss, dB", "best of all, dB"
HEAD = f"| {' | '.join((*_COLUMNS, 'strength by loss', 'dB', 'by pictures', 'dB'))} |"


@dataclass(frozen=True)
class Found:
    """Results of a training: PSNR (dB) and validation loss by validated step, and by strength of the `chosen` step."""

    row: str
    psnr: dict[int, float]
    losses: dict[int, float]
    chosen: int
    measured: list[Measured]
    losses_at: dict[float, float]


class _Seen(SilentObserver):
    def __init__(self) -> None:
        self.psnr: dict[int, float] = {}
        self.losses: dict[int, float] = {}

    def on_step(self, report: StepReport) -> None:
        if report.validation_loss is not None:
            self.losses[report.step] = report.validation_loss

    def on_samples(self, report: SampleReport) -> None:
        self.psnr[report.step] = report.psnr_lora or 0.0


def run(folder: Path, tokenizer: Path, which: tuple[str, int]) -> Found:
    """Train, and collect what was measured."""
    torch.set_num_threads(1)
    row, seed = which
    training = Training(f"best-{row}", "negative", seed, {**_LONG, "trained": ROWS[row]}, with_old=False)
    job, seen, measured, losses = job_of(folder, training, tokenizer), _Seen(), list[Measured](), dict[float, float]()

    def recorded(at_strength: Any, psnr: Any) -> list[Measured]:
        validator = psnr.func.__self__
        for strength in STRENGTHS:
            with at_strength(strength):
                losses[strength] = validator.loss(*psnr.args)
        measured.extend(compare(at_strength, psnr))
        return measured

    results.compare = recorded
    encoded, held_out = encode_job(job)
    result = train_lora(job.train_config(str(encoded.manifest), str(held_out.manifest) if held_out else ""), seen)
    state = json.loads((result.run_dir / "run.json").read_text(encoding="utf-8"))
    chosen = state["result"].get("best_step", result.steps_done)
    return Found(row, seen.psnr, seen.losses, int(chosen), measured, losses)


def line(found: Sequence[Found]) -> str:
    """The table's line for the seeds of a row."""

    def at(each: Found, strength: float) -> float:
        return next(one.psnr for one in each.measured if one.strength == strength)

    by_loss = [min(each.losses_at, key=each.losses_at.__getitem__) for each in found]
    by_pictures = [advised(each.measured) for each in found]
    cells = [
        mean_and_spread(list(each.psnr.values())[-1] for each in found),
        ", ".join(str(each.chosen) for each in found),
        mean_and_spread(each.psnr[each.chosen] for each in found),
        mean_and_spread(each.psnr[min(each.losses, key=each.losses.__getitem__)] for each in found),
        mean_and_spread(max(each.psnr.values()) for each in found),
        ", ".join(f"{strength:g}" for strength in by_loss),
        mean_and_spread(at(each, strength) for each, strength in zip(found, by_loss, strict=True)),
        ", ".join(f"{strength:g}" for strength in by_pictures),
        mean_and_spread(at(each, strength) for each, strength in zip(found, by_pictures, strict=True)),
    ]
    return f"| {found[0].row} | {' | '.join(cells)} |"


def main() -> None:
    """Train all rows and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the Qwen2.5 tokenizer")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each with one thread")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sets(folder)
        for part in ("reference", "target"):
            (folder / "few" / part).mkdir(parents=True)
            for path in sorted((folder / "negative/trained" / part).iterdir())[: FEW * (1 + (part == "target"))]:
                (folder / "few" / part / path.name).write_bytes(path.read_bytes())
        for row in ROWS:
            encode_job(
                job_of(folder, Training(row, "negative", 0, {"trained": ROWS[row]}, with_old=False), options.tokenizer)
            )
        print(HEAD)
        print("| --- " * (HEAD.count("|") - 1) + "|", flush=True)
        with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
            which = [(row, seed) for row in ROWS for seed in range(options.seeds)]
            for _, found in groupby(pool.map(partial(run, folder, options.tokenizer), which), lambda each: each.row):
                print(line(list(found)), flush=True)


if __name__ == "__main__":
    main()
