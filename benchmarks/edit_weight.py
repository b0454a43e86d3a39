"""What `edit_weight` does for a small edit: `python -m benchmarks.edit_weight --tokenizer FOLDER --jobs 16`.

Trains the demo model to recolour a ball that covers a tenth of the picture, with each kind and source of the weights.
Prints a Markdown table: PSNR of held-out pairs inside and outside of the ball, and how much more that is than without
edit_weight with the same seed; mean and standard deviation over seeds.
Every training has one thread; `--jobs` of them run at a time. edit_weight_2026-12.md has results.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from trainer_core.conditioning.encode import encode_dataset
from trainer_core.config import DatasetConfig, EncodingConfig, ModelConfig, TrainConfig
from trainer_core.config.training import EditWeightFrom, EditWeightKind
from trainer_core.data.pairing import pair_folders
from trainer_core.demo.pictures import PAIRS
from trainer_core.presets import encoding_preset, training_preset
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.rng import stream
from trainer_core.run import train_lora

CAPTION = "make the red ball green"
SHARE = 0.1  # of the picture's area
KINDS: tuple[EditWeightKind, ...] = ("linear", "logarithmic")
SOURCES: tuple[EditWeightFrom, ...] = ("latents", "pixels")
_HELD_OUT = 4  # photographs; each gives two pairs
_SAMPLING_STEPS = 4
_RED, _GREEN = (0.9, 0.15, 0.1), (0.1, 0.75, 0.2)


class Row(NamedTuple):
    """A row of the table."""

    weight: float = 0.0
    kind: EditWeightKind = "linear"
    source: EditWeightFrom = "latents"


class Decibels(NamedTuple):
    """Mean PSNR of the held-out pairs."""

    inside: float
    outside: float


def rows(weights: list[float]) -> list[Row]:
    """The rows of the table: one without a weight, then each weight with each kind and source."""
    return [Row(), *(Row(*each) for each in itertools.product(weights, KINDS, SOURCES))]


def make_pairs(folder: Path) -> tuple[str, ...]:
    """Write `folder`/reference/*.png and `folder`/target/*.png with *.txt captions. Returns the keys to hold out.

    Every photograph of the demo gives two pairs, one of them mirrored, with balls at different places. The pairs of
    a photograph are either all held out or all trained.
    """
    for part in ("reference", "target"):
        (folder / part).mkdir(parents=True)
    held_out: list[str] = []
    photographs = sorted((PAIRS / "reference").glob("*.png"))
    for number, path in enumerate(photographs):
        with Image.open(path) as opened:
            photograph = opened.convert("RGB")
        for name, picture in (("plain", photograph), ("mirrored", ImageOps.mirror(photograph))):
            key = f"{path.stem}_{name}"
            left, top, light = torch.rand(3, generator=stream(0, "ball", key)).tolist()
            for part, colour in (("reference", _RED), ("target", _GREEN)):
                with_ball(picture, (left, top), light, colour).save(folder / part / f"{key}.png")
            (folder / "target" / f"{key}.txt").write_text(CAPTION + "\n", encoding="utf-8")
            held_out += [key] * (number % (len(photographs) // _HELD_OUT) == 0)
    return tuple(held_out)


def with_ball(
    picture: Image.Image, place: tuple[float, float], light: float, colour: tuple[float, float, float]
) -> Image.Image:
    """The picture with a ball. `place` is in 0..1 from left and top, `light` the brightness in 0..1."""
    radius = math.sqrt(SHARE * picture.width * picture.height / math.pi)
    left, top = (radius + share * (side - 2 * radius) for share, side in zip(place, picture.size, strict=True))
    y, x = np.mgrid[: picture.height, : picture.width]
    across, down = (x - left) / radius, (y - top) / radius
    depth = np.sqrt(np.clip(1 - across**2 - down**2, 0, 1))
    shade = (0.5 + 0.5 * light) * np.clip(0.25 + 0.75 * (depth - 0.4 * across - 0.4 * down), 0, 1)
    pixels = np.array(picture)
    inside = depth > 0
    pixels[inside] = (255 * shade[..., None] * np.array(colour))[inside].round()
    return Image.fromarray(pixels)


def train(config: TrainConfig) -> tuple[Decibels, float]:
    """Train and compare the validation pictures with their targets. Returns the seconds as well."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    result = train_lora(config)
    seconds = time.perf_counter() - began
    return compare(result.run_dir / "samples" / f"step-{config.max_train_steps:06d}", "lora"), seconds


def compare(samples: Path, column: str) -> Decibels:
    """Mean PSNR of the pictures of a column of validation pictures."""
    found = [_decibels(samples, target, column) for target in sorted(samples.glob("*-target.png"))]
    return Decibels(*(statistics.mean(each) for each in zip(*found, strict=True)))


def _decibels(samples: Path, target: Path, column: str) -> Decibels:
    number = target.name.split("-", 1)[0]
    wanted, reference, drawn = (_pixels(samples / f"{number}-{name}.png") for name in ("target", "reference-1", column))
    inside = (wanted != reference).any(axis=-1)
    error = ((wanted - drawn) ** 2).mean(axis=-1)
    return Decibels(*(10 * math.log10(255**2 / max(float(error[where].mean()), 1e-9)) for where in (inside, ~inside)))


def _pixels(file: Path) -> NDArray[np.float64]:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), np.float64)


def encode(folder: Path, model: ModelConfig) -> tuple[Path, int]:
    """Make and encode the pairs. Returns the manifest and the number of held-out pairs."""
    held_out = make_pairs(folder / "pairs")
    places = DatasetConfig(
        target_dir=str(folder / "pairs" / "target"), reference_dirs=(str(folder / "pairs" / "reference"),)
    )
    dataset = dataclasses.replace(pair_folders(places), held_out=held_out)
    encoding: EncodingConfig = dataclasses.replace(encoding_preset("demo"), encode_pixel_difference=True)
    return encode_dataset(dataset, BaseModel(model), encoding, folder / "cache").manifest, len(held_out)


def configs(arguments: argparse.Namespace, folder: Path, model: ModelConfig) -> Iterator[tuple[Row, TrainConfig]]:
    """Every training, with its row. Encodes the pairs."""
    manifest, held_out = encode(folder, model)
    preset = training_preset("demo")
    for seed, row in itertools.product(range(arguments.seeds), rows(arguments.weights)):
        noise = dataclasses.replace(
            preset.noise, edit_weight=row.weight, edit_weight_kind=row.kind, edit_weight_from=row.source
        )
        yield (
            row,
            dataclasses.replace(
                preset,
                run_dir=str(folder / "runs" / f"{row.weight}-{row.kind}-{row.source}-{seed}"),
                encoded=str(manifest),
                model=model,
                seed=seed,
                max_train_steps=arguments.steps,
                noise=noise,
                validation=dataclasses.replace(
                    preset.validation,
                    validation_step_interval=arguments.steps,
                    validation_num_inference_steps=_SAMPLING_STEPS,
                    num_validation_images=held_out,
                ),
            ),
        )


def spread(values: list[float]) -> str:
    """Mean and standard deviation."""
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"


def table(found: dict[Row, list[Decibels]]) -> str:
    """The Markdown table of the PSNR of each row by seed."""
    names = ("edit_weight", "kind", "from", "inside, dB", "outside, dB", "gain inside", "gain outside")
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for row, values in found.items():
        sides = [list(side) for side in zip(*values, strict=True)]
        without = [list(side) for side in zip(*found[Row()], strict=True)]
        gains = [[a - b for a, b in zip(*both, strict=True)] for both in zip(sides, without, strict=True)]
        named = [row.kind, row.source, *map(spread, sides), *map(spread, gains)]
        cells = named if row.weight else ["", "", *named[2:4], "", ""]
        lines.append(f"| {' | '.join([f'{row.weight:g}', *cells])} |")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True, help="comfy/text_encoders/qwen25_tokenizer")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time, one thread each")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--weights", type=float, nargs="*", default=[0.3, 0.6])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    model = ModelConfig(tokenizer=str(arguments.tokenizer.absolute()), mixed_precision="no", device="cpu")
    found: dict[Row, list[Decibels]] = {}
    seconds: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        planned = list(configs(arguments, Path(name), model))
        spawned = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.jobs, mp_context=spawned) as pool:
            for (row, config), (decibels, took) in zip(
                planned, pool.map(train, [config for _, config in planned]), strict=True
            ):
                found.setdefault(row, []).append(decibels)
                seconds.append(took)
                print(f"{Path(config.run_dir).name}: {decibels} in {took:.0f} s", file=sys.stderr, flush=True)
        samples = Path(planned[0][1].run_dir) / "samples" / f"step-{arguments.steps:06d}"
        untrained, unchanged = compare(samples, "base"), compare(samples, "reference-1")
    print(f"{arguments.steps} steps, {arguments.seeds} seeds, torch {torch.__version__}; ", end="")
    print(f"a training took {statistics.mean(seconds):.0f} s\n")
    print(table(found))
    print(f"| the base model | | | {untrained.inside:.2f} | {untrained.outside:.2f} | | |")
    print(f"| the reference itself | | | {unchanged.inside:.2f} | | | |")


if __name__ == "__main__":
    main()
