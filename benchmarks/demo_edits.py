"""Trains demo edits under many settings, several at a time, and measures new and old edits on held-out pictures.

For `benchmarks.preservation` and `benchmarks.recipes`. A training is the demo preset with some changes, in a process
with one thread. All share a cache, which is complete before the first of them starts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from tools.pretrain_demo.instructions import INSTRUCTIONS
from trainer_core.conditioning.pictures import to_picture, to_tensor
from trainer_core.config import JobConfig, from_json
from trainer_core.demo.pictures import CAPTION, PAIRS
from trainer_core.events import SilentObserver, StepReport
from trainer_core.job import encode_job
from trainer_core.pictures.sample_pictures import read_sample_index
from trainer_core.presets import with_preset
from trainer_core.run import train_lora
from trainer_core.settings import merged
from trainer_core.training.validation_pictures import psnr

_OLD = ("copy", "grey", "darker", "red-blue", "sepia", "warm", "mirror")
OLD = tuple(each for each in INSTRUCTIONS if each.name in _OLD)
"""Edits that the demo model knows: the picture as it is, colours, and one that moves pixels."""


def sketch(picture: Image.Image) -> Image.Image:
    """Dark lines on white, where brightness changes."""
    grey = ImageOps.grayscale(picture)
    lines = ImageChops.difference(grey, grey.filter(ImageFilter.GaussianBlur(2)))
    return ImageOps.invert(lines.point(lambda level: min(255, 6 * level))).convert("RGB")


NEW: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "negative": (CAPTION, ImageOps.invert),
    "sketch": ("draw the photo as a pencil sketch", sketch),
}
"""Edits that the demo model does not know: caption and function of 8-bit pictures."""


@dataclass(frozen=True)
class Training:
    """A training of `edit` with changes to the demo preset's job. `with_old`: old edits are measured too."""

    row: str
    edit: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    with_old: bool = True


@dataclass(frozen=True)
class Outcome:
    """PSNR in dB of held-out pictures by edit, of the base model and with the LoRA; the validation loss at the end."""

    training: Training
    base: dict[str, float]
    lora: dict[str, float]
    loss: float
    seconds: float


def write_sets(folder: Path) -> None:
    """Write a folder of pairs for each new edit and for the old ones, with held-out pairs in folders of their own."""
    held_out = (PAIRS / "held_out.txt").read_text(encoding="utf-8").split()
    pictures = {path.stem: Image.open(path).convert("RGB") for path in sorted((PAIRS / "reference").glob("*.png"))}
    for name, (caption, edit) in NEW.items():
        for stem, picture in pictures.items():
            part = "held_out" if stem in held_out else "trained"
            _write(folder / name / part, stem, picture, edit(picture), caption)
    for instruction in OLD:
        for stem, picture in pictures.items():
            edited = to_picture(instruction.edit(to_tensor(picture)[None])[0])
            part = "old_held_out" if stem in held_out else "old_trained"
            _write(folder / part, f"{instruction.name}-{stem}", picture, edited, instruction.phrasings[0])


def _write(folder: Path, stem: str, reference: Image.Image, target: Image.Image, caption: str) -> None:
    for part in ("reference", "target"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    reference.save(folder / "reference" / f"{stem}.png")
    target.save(folder / "target" / f"{stem}.png")
    (folder / "target" / f"{stem}.txt").write_text(caption + "\n", encoding="utf-8")


def job_of(folder: Path, training: Training, tokenizer: Path) -> JobConfig:
    """The job of a training. It validates only at the end, with the held-out pictures of the new edit and the old ones.

    `extra_sets` among the changes: further data sets, each with its `place` below `folder`; `trained`: the place of the
    pairs to learn, if not all of the edit's.
    """
    name = f"{training.row}-{training.edit}-{training.seed}".replace(" ", "_").replace("/", "-")

    def part(identity: str, place: str, **more: Any) -> dict[str, Any]:
        target, reference = folder / place / "target", folder / place / "reference"
        dataset = {"target_dir": str(target), "reference_dirs": [str(reference)]}
        return {"id": identity, "dataset": dataset, **more}

    changes = dict(training.changes)
    trained = changes.pop("trained", f"{training.edit}/trained")
    extra = [part(each.pop("id"), **each) for each in map(dict, changes.pop("extra_sets", ()))]
    values = {
        "run_dir": str(folder / "runs" / name),
        "cache_dir": str(folder / "cache"),
        "model": {"base": "demo", "flavour": "edit-v2", "tokenizer": str(tokenizer), "device": "cpu"},
        "seed": training.seed,
        "datasets": [
            part("new", trained),
            *extra,
            part("held_out", f"{training.edit}/held_out"),
            *([part("old", "old_held_out")] if training.with_old else []),
        ],
        "eval_dataset_id": ["held_out", "old"] if training.with_old else ["held_out"],
        "validation": {
            "validation_step_interval": 0,
            "num_validation_images": 100,
            "validation_loras_total_limit": 0,
            "strength_sweep": "none",
        },
    }
    return from_json(JobConfig, merged(with_preset(values, "demo"), changes))


class _Last(SilentObserver):
    """Keeps the last report."""

    report: StepReport | None = None

    def on_step(self, report: StepReport) -> None:
        self.report = report


def run(folder: Path, tokenizer: Path, training: Training) -> Outcome:
    """Train, and measure the pictures of the last validation."""
    torch.set_num_threads(1)
    job, last = job_of(folder, training, tokenizer), _Last()
    encoded, held_out = encode_job(job)
    result = train_lora(job.train_config(str(encoded.manifest), str(held_out.manifest) if held_out else ""), last)
    assert result.samples is not None
    assert last.report is not None
    base, lora = dict[str, list[float]](), dict[str, list[float]]()
    captions = {instruction.phrasings[0]: instruction.name for instruction in OLD}
    shown = "ema" if result.ema_file else "lora"
    place = result.samples.grid_file.with_suffix("")
    for row in read_sample_index(place):
        files = {name: place / file for name, file in row["pictures"].items()}
        target = _pixels(files["target"])
        name = captions.get(row["caption"], training.edit)
        base.setdefault(name, []).append(psnr(_pixels(files["base"]), target))
        lora.setdefault(name, []).append(psnr(_pixels(files[shown]), target))
    loss = last.report.ema_validation_loss if result.ema_file else last.report.validation_loss
    seconds = last.report.seconds
    return Outcome(training, _means(base), _means(lora), loss or 0.0, seconds)


def _pixels(path: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(path).convert("RGB"), dtype=np.float32) / 255)


def _means(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.fmean(values) for name, values in found.items()}


def run_all(folder: Path, tokenizer: Path, trainings: Sequence[Training], jobs: int) -> Iterator[list[Outcome]]:
    """The outcomes of each row, from `jobs` processes. Encodes first what any of the trainings needs."""
    write_sets(folder)
    for training in trainings:
        encode_job(job_of(folder, training, tokenizer))
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        for _, outcomes in groupby(
            pool.map(partial(run, folder, tokenizer), trainings), lambda each: each.training.row
        ):
            yield list(outcomes)


def mean_and_spread(values: Iterable[float]) -> str:
    """Mean and standard deviation of several seeds, such as 21.3 ± 0.2."""
    found = list(values)
    spread = statistics.stdev(found) if len(found) > 1 else float("nan")
    return f"{statistics.fmean(found):.2f} ± {spread:.2f}"
