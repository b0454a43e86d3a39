"""Every choice of the training on the demo edit: `python -m benchmarks.features --tokenizer FOLDER`.

Prints a Markdown table with a row per choice: peak signal-to-noise ratio of held-out pairs before and after, validation
loss, and what it cost. A row is the demo's settings with some of them changed; to add a choice, add a row to ROWS.
What the table shows is that each choice trains; which is better on a real edit it does not.
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
from trainer_core.demo.pictures import make_demo_pairs
from trainer_core.events import SilentObserver, StepReport
from trainer_core.job import encode_job
from trainer_core.run import train_lora


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a row; ratios in dB."""

    base: float
    lora: float
    validation_loss: float
    extra_forwards: int
    seconds: float

    def cells(self) -> list[str]:
        """For the table."""
        numbers = [f"{self.base:.2f}", f"{self.lora:.2f}", f"{self.lora - self.base:+.2f}"]
        return [*numbers, f"{self.validation_loss:.4f}", str(self.extra_forwards or ""), f"{self.seconds:.3f}"]


class Reports(SilentObserver):
    """Keeps them."""

    def __init__(self) -> None:
        self.all: list[StepReport] = []

    def on_step(self, report: StepReport) -> None:
        self.all.append(report)


def train(job: JobConfig, file: Path) -> Outcome:
    """Encode what is missing, train, and put the LoRA under a name of the row."""
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
    parser.add_argument("--only", nargs="*", default=[], help="rows with one of these words in their name")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--keep", type=Path, help="a folder for the LoRA files, which features_in_comfyui.py reads")
    arguments = parser.parse_args()
    chosen = {name: row for name, row in ROWS.items() if not arguments.only or any(w in name for w in arguments.only)}
    print(f"{arguments.steps} steps of 4 pairs at 128 px; torch {torch.__version__}\n")
    print("| row | psnr base | psnr LoRA | gain | validation loss | extra forwards | seconds per step |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        make_demo_pairs(Path(folder) / "pairs")
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
