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
from typing import Any

import torch

from trainer_core.config import JobConfig, from_json
from trainer_core.demo.pictures import make_demo_pairs
from trainer_core.events import SilentObserver, StepReport
from trainer_core.job import encode_job, resolve_job
from trainer_core.run import train_lora

DEMO: dict[str, Any] = {
    "model": {"base": "demo", "mixed_precision": "no"},
    "dataset": {"target_dir": "pairs/target", "reference_dirs": ["pairs/reference"]},
    "encoding": {"resolution": 128, "match_target_res": True, "num_eval_images": 4},
    "cache_dir": "cache",
    "run_dir": "runs",
    "gradient_checkpointing": False,
    "lora": {"lora_targets": "attention-mlp"},
    "optimizer": {"learning_rate": 2e-3},
    "batching": {"train_batch_size": 4, "gradient_accumulation_steps": 1},
    "validation": {
        "validation_step_interval": 0,
        "validation_num_inference_steps": 20,
        "validation_guidance": 1.0,
        "num_validation_images": 4,
    },
}

Changes = dict[str, dict[str, Any]]
FIRST = "the demo's settings (adamw, logit_normal, l2)"


def rollout(**changes: Any) -> Changes:
    """Scheduled sampling of half the pairs with these of its settings, without their common prefix."""
    values = {"max_step_offset": 5, "probability": 0.5, **changes}
    return {"rollout": {f"scheduled_sampling_{name}": value for name, value in values.items()}}


ROWS: dict[str, Changes] = {
    FIRST: {},
    "optimizer adafactor": {"optimizer": {"optimizer": "adafactor"}},
    "optimizer lion": {"optimizer": {"optimizer": "lion", "learning_rate": 5e-4}},
    "optimizer prodigy": {"optimizer": {"optimizer": "prodigy", "learning_rate": 1.0}},
    "optimizer adamw-schedulefree": {"optimizer": {"optimizer": "adamw-schedulefree", "learning_rate": 5e-3}},
    "lr_scheduler constant": {"optimizer": {"lr_scheduler": "constant", "lr_warmup_steps": 0}},
    "lr_scheduler linear": {"optimizer": {"lr_scheduler": "linear", "learning_rate": 3e-3}},
    "lr_scheduler cosine": {"optimizer": {"lr_scheduler": "cosine", "learning_rate": 3e-3}},
    "lr_scheduler cosine_with_restarts": {
        "optimizer": {"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2, "learning_rate": 3e-3}
    },
    "lr_scheduler polynomial": {"optimizer": {"lr_scheduler": "polynomial", "lr_power": 2.0, "learning_rate": 4e-3}},
    "sigma_distribution uniform": {"noise": {"sigma_distribution": "uniform"}},
    "sigma_distribution mode": {"noise": {"sigma_distribution": "mode"}},
    "sigma_distribution cosmap": {"noise": {"sigma_distribution": "cosmap"}},
    "stratified_sigmas": {"noise": {"stratified_sigmas": True}},
    "flow_schedule_auto_shift": {"noise": {"flow_schedule_auto_shift": True}},
    "loss_type huber": {"noise": {"loss_type": "huber"}},
    "loss_type huber, huber_schedule exponential": {"noise": {"loss_type": "huber", "huber_schedule": "exponential"}},
    "loss_type huber, huber_schedule constant": {"noise": {"loss_type": "huber", "huber_schedule": "constant"}},
    "loss_type smooth_l1": {"noise": {"loss_type": "smooth_l1"}},
    "lora_type dora": {"lora": {"lora_type": "dora"}},
    "lora_type lokr": {"lora": {"lora_type": "lokr", "lokr_factor": 4}, "optimizer": {"learning_rate": 5e-3}},
    "use_rslora at rank 64": {
        "lora": {"lora_rank": 64, "use_rslora": True},
        "optimizer": {"learning_rate": 5e-4},
    },
    "rank_pattern, 4 in the first block": {"lora": {"rank_pattern": ["0 = 4"]}},
    "alpha_pattern, 4 in the first block": {"lora": {"alpha_pattern": ["0 = 4"]}},
    "init_lora, the first row's file": {"lora": {"init_lora": f"files/{FIRST}.safetensors"}},
    "use_ema, the average's file": {"ema": {"use_ema": True, "ema_decay": 0.95, "ema_validation": "ema_only"}},
    "rollout euler": rollout(sampler="euler", reflexflow=False),
    "rollout unipc, ReflexFlow": rollout(),
    "rollout dpm on a ramp": rollout(sampler="dpm", ramp_steps=60, reflexflow=False),
    "rollout rk4 on a cosine ramp": rollout(sampler="rk4", ramp_steps=60, ramp_shape="cosine", reflexflow=False),
    "rollout biased_early": rollout(strategy="biased_early", sampler="euler", reflexflow=False),
    "rollout biased_late": rollout(strategy="biased_late", sampler="euler", reflexflow=False),
}


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


def job_of(changes: Changes, name: str, work: Path, arguments: argparse.Namespace) -> JobConfig:
    """The demo's job with a row's changes."""
    values = {**DEMO, "max_train_steps": arguments.steps, "run_dir": f"runs/{name}"}
    values["model"] = {**DEMO["model"], "tokenizer": str(arguments.tokenizer.resolve()), "device": arguments.device}
    for section, settings in changes.items():
        values[section] = {**values.get(section, {}), **settings} if isinstance(settings, dict) else settings
    return resolve_job(from_json(JobConfig, values), work)


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
