"""Trains the demo edit with every feature: `python -m benchmarks.features --tokenizer FOLDER`.

Prints a Markdown table with a row per feature: PSNR of held-out pairs before and after training, validation loss and
cost. A row is the demo's settings with some changes; to add one, extend ROWS. The table shows that each feature trains,
not which one is best for a real edit.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

from tests.support.feature_rows import ROWS, job_of
from trainer_core.config import JobConfig
from trainer_core.demo.pictures import copy_demo_pairs
from trainer_core.events import SilentObserver, StepReport
from trainer_core.job import encode_job
from trainer_core.run import train_lora


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Results of a row. `base` and `lora` are PSNR in dB; `seconds` is per step."""

    base: float
    lora: float
    validation_loss: float
    extra_forwards: int
    seconds: float

    def cells(self) -> list[str]:
        """Cells of the table."""
        numbers = [f"{self.base:.2f}", f"{self.lora:.2f}", f"{self.lora - self.base:+.2f}"]
        return [*numbers, f"{self.validation_loss:.4f}", str(self.extra_forwards or ""), f"{self.seconds:.3f}"]


class Reports(SilentObserver):
    """Stores the reports of all steps."""

    def __init__(self) -> None:
        self.all: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.all.append(report)


def train(job: JobConfig, file: Path) -> Outcome:
    """Encode what is missing, train, and copy the LoRA to `file`."""
    encoded, _ = encode_job(job)
    reports = Reports()
    began = time.perf_counter()
    result = train_lora(job.train_config(str(encoded.manifest)), reports)
    seconds = time.perf_counter() - began
    samples, last = result.samples, reports.all[-1]
    assert samples is not None
    assert result.lora_file is not None
    shutil.copy2(result.ema_file or result.lora_file, file)
    psnr, loss = (
        (samples.psnr_ema, last.ema_validation_loss) if result.ema_file else (samples.psnr_lora, last.validation_loss)
    )
    assert samples.psnr_base is not None
    assert psnr is not None
    assert loss is not None
    return Outcome(
        samples.psnr_base,
        psnr,
        loss,
        sum(report.extra_forwards or 0 for report in reports.all),
        seconds / len(reports.all),
    )


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", type=Path, required=True, help="comfy/text_encoders/qwen25_tokenizer")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--only", nargs="*", default=[], help="run only rows with one of these words in their name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=Path, help="copy the LoRA files to this folder, for features_in_comfyui.py")
    arguments = parser.parse_args()
    chosen = {name: row for name, row in ROWS.items() if not arguments.only or any(w in name for w in arguments.only)}
    print(f"{arguments.steps} steps of 4 pairs at 128 px; torch {torch.__version__}\n")
    print("| row | psnr base | psnr LoRA | gain | validation loss | extra forwards | seconds per step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        copy_demo_pairs(Path(folder) / "pairs")
        files = Path(folder) / "files"
        files.mkdir()
        for number, (name, changes) in enumerate(chosen.items()):
            file = files / f"{name}.safetensors"
            outcome = train(job_of(changes, f"row{number}", Path(folder), arguments), file)
            if arguments.keep:
                arguments.keep.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, arguments.keep)
            print(f"| {' | '.join([name, *outcome.cells()])} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
