"""Encodes many pairs: pairs per second, peak memory, and seconds to start when everything is in the cache.

    python -m benchmarks.encode --tokenizer <ComfyUI>/comfy/text_encoders/qwen25_tokenizer --pairs 10 1000 10000

Uses the demo model on small pictures. With `--stand-ins` the networks do nothing, which measures only the work around
them. Each row is a separate process: `first` encodes; `again` finds everything encoded and does what a training does
before it loads a network: read the folders, compare the pictures with the stored checks, look up the cache entries.

    python -m benchmarks.encode --tokenizer ... --device cuda --files FOLDER --pairs 64 --side 1024

Uses the full-size networks on a GPU, with random weights in files of ComfyUI's layouts, which it writes to FOLDER if
they are not there (16 GB). Rows differ in the size of the card, the text encoder's precision, and in whether pictures
and prompts are encoded in batches or one by one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.card_files import (
    TEXT_ENCODERS,
    TRANSFORMER,
    VAE,
    WHOLE_VAE,
    text_encoder_layout,
    transformer_layout,
    vae_layout,
    write,
)
from benchmarks.card_probe import cap_memory
from tests.support.narrow import small_encoding
from trainer_core.conditioning import encoders as own_encoders
from trainer_core.conditioning.encode import encode_dataset
from trainer_core.conditioning.encoded import load_encoded
from trainer_core.conditioning.encoders import EncodePictures, Encoders, PictureEncoder, PromptEncoder
from trainer_core.config import BaseModelPrecision, DatasetConfig, EncodingConfig, ModelConfig
from trainer_core.data.pairing import pair_folders
from trainer_core.events import Observer, SilentObserver
from trainer_core.qwen_image import text_encoder
from trainer_core.qwen_image.base_model import BaseModel

MIB = 2**20


def make_folders(folder: Path, pairs: int, side: int) -> None:
    """Write pairs of noise as PNG files, all different, with a caption each."""
    draws = np.random.default_rng(0)
    for part in ("target", "reference"):
        (folder / part).mkdir(parents=True)
        for number in range(pairs):
            pixels = draws.integers(0, 256, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / part / f"{number:05d}.png", compress_level=1)
    for number in range(pairs):
        (folder / "target" / f"{number:05d}.txt").write_text(f"Make it number {number}.\n")


def stand_ins(width: int) -> Encoders:
    """Networks that return zeros without computing anything."""

    @contextmanager
    def pictures(_observer: Observer) -> Iterator[EncodePictures]:
        yield lambda each: (torch.zeros(16, pixels.shape[1] // 8, pixels.shape[2] // 8) for pixels in each)

    @contextmanager
    def prompts(_observer: Observer) -> Iterator[Prompts]:
        yield Prompts(width)

    return Encoders(pictures=PictureEncoder("none", pictures), prompts=PromptEncoder("none", prompts))


class Prompts:
    """A prompt encoder that returns zeros."""

    def __init__(self, width: int) -> None:
        self.width = width

    def see_all(self, pictures: Iterable[object]) -> Iterator[object]:
        """Yields the pictures unchanged."""
        yield from pictures

    def encode_all(self, prompts: Iterable[tuple[str, Sequence[object]]]) -> Iterator[torch.Tensor]:
        """Yields zeros [40, width]."""
        for _ in prompts:
            yield torch.zeros(40, self.width)


def one_start(folder: Path, tokenizer: str, side: int, *, without: bool) -> dict[str, float]:
    """Pair, encode and look up everything in this process. Returns seconds and bytes."""
    memory_before = peak_bytes()
    began = time.perf_counter()
    dataset = pair_folders(
        DatasetConfig(target_dir=str(folder / "target"), reference_dirs=(str(folder / "reference"),)),
        checked_dir=folder / "cache" / "checked",
    )
    paired = time.perf_counter()
    model = ModelConfig(tokenizer=tokenizer, mixed_precision="no", device="cpu")
    encoders = stand_ins(BaseModel(model).prompt_width) if without else None
    made = encode_dataset(
        dataset, BaseModel(model), small_encoding(resolution=side), folder / "cache", encoders=encoders
    )
    encoded = time.perf_counter()
    assert not load_encoded(made.manifest).missing()
    ended = time.perf_counter()
    return {
        "pairing": paired - began,
        "encoding": encoded - paired,
        "reading": ended - encoded,
        "peak": peak_bytes(),
        "before": memory_before,
    }


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measured(folder: Path, tokenizer: str, side: int, *, without: bool) -> dict[str, float]:
    """`one_start` in a new process."""
    command = [sys.executable, "-m", "benchmarks.encode", "--tokenizer", tokenizer, "--side", str(side)]
    command += ["--stand-ins"] if without else []
    done = subprocess.run([*command, "--folder", str(folder)], check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Card:
    """A row on a GPU. `gib`: the card's memory, 0 for all of it."""

    gib: float
    precision: BaseModelPrecision = "none"
    batches: bool = True


CARDS = (
    *(Card(0), Card(0, batches=False), Card(16), Card(12), Card(8), Card(8, batches=False)),
    *(Card(8, "int8-quanto"), Card(8, "nf4-bnb")),
)


class Phases(SilentObserver):
    """Seconds and peaks of reserved device memory. Those of pictures include loading the VAE."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.row: dict[str, float] = {}

    def on_progress(self, phase: str, done: int, total: int) -> None:
        """Note the end of a phase."""
        if done == total and phase.startswith(("Loading", "Encoding")):
            torch.cuda.synchronize()
            self.row[f"{phase}, s"] = time.perf_counter() - self.start
            self.row[f"{phase}, GiB"] = torch.cuda.max_memory_reserved() / 2**30
            self.start = time.perf_counter()
            torch.cuda.reset_peak_memory_stats()


def on_card(folder: Path, tokenizer: str, side: int, files: Path, card: Card) -> dict[str, float]:
    """Encode the pairs on this process's GPU. Returns what `Phases` measured, and the number of streamed layers."""
    if card.gib:
        cap_memory(torch, card.gib)
    if not card.batches:
        own_encoders.batch_pixels = lambda *_: 0
        text_encoder.BATCH_TOKENS = 0
    model = ModelConfig(
        transformer_file=str(files / TRANSFORMER),
        text_encoder_file=str(files / TEXT_ENCODERS["bf16"]),
        vae_file=str(files / VAE),
        tokenizer=tokenizer,
        flavour="edit-v2",
        text_encoder_precision=card.precision,
    )
    folders = DatasetConfig(target_dir=str(folder / "target"), reference_dirs=(str(folder / "reference"),))
    dataset = pair_folders(folders, checked_dir=folder / "cache" / "checked")
    base, phases = BaseModel(model), Phases()
    streamed = text_encoder._streamed_layers(base, torch.bfloat16, torch.device("cuda"))
    with tempfile.TemporaryDirectory() as cache:
        encode_dataset(dataset, base, EncodingConfig(resolution=side, num_eval_images=0), Path(cache), phases)
    return {**phases.row, "streamed layers": len(streamed)}


def cards_table(given: argparse.Namespace) -> None:
    """Print the table of CARDS, each in a new process."""
    write_files(given.files)
    pairs = given.pairs[0]
    print(f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}")
    print(f"{pairs} pairs of {given.side} x {given.side} pixels with one reference and one caption, edit-v2")
    shown = ["Encoding pictures, s", "Loading the text encoder, s", "Encoding prompts, s"]
    shown += ["Encoding pictures, GiB", "Encoding prompts, GiB", "streamed layers"]
    print(f"| card, GiB | precision | batches | {' | '.join(shown)} | pairs/min without loading |")
    print("| --- " * (4 + len(shown)) + "|")
    with tempfile.TemporaryDirectory() as name:
        make_folders(Path(name), pairs, given.side)
        for number, card in enumerate(CARDS):
            command = [sys.executable, "-m", "benchmarks.encode", "--tokenizer", given.tokenizer, "--folder", name]
            command += ["--side", str(given.side), "--files", str(given.files), "--card", str(number)]
            done = subprocess.run(command, check=False, capture_output=True, text=True)
            start = f"| {card.gib or 'all'} | {card.precision} | {'yes' if card.batches else 'no'} |"
            if done.returncode:
                print(start, done.stderr.strip().splitlines()[-1], flush=True)
                continue
            row = json.loads(done.stdout.splitlines()[-1])
            speed = 60 * pairs / (row["Encoding pictures, s"] + row["Encoding prompts, s"])
            print(start, " | ".join(f"{row[each]:.2f}" for each in shown), f"| {speed:.0f} |", flush=True)


def write_files(files: Path) -> None:
    """Write the full-size text encoder and VAE, and a transformer of one layer, of which only the header is read."""
    layouts = {
        TRANSFORMER: lambda: transformer_layout(1),
        TEXT_ENCODERS["bf16"]: lambda: text_encoder_layout("bf16", 0),
        VAE: lambda: vae_layout(WHOLE_VAE),
    }
    for name, layout in layouts.items():
        if not (files / name).is_file():
            write(files / name, layout(), torch.device("cuda"))
    torch.cuda.empty_cache()


def main() -> None:
    """Print the table. With `--folder`, measure one row and print it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, help="comfy/text_encoders/qwen25_tokenizer")
    parser.add_argument("--pairs", type=int, nargs="+", default=[10, 1000, 10_000])
    parser.add_argument("--side", type=int, default=64, help="side of the pictures in pixels")
    parser.add_argument("--stand-ins", action="store_true", help="networks that do nothing")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--files", type=Path, help="folder of the full-size files, for --device cuda")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--card", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.card is not None:
        print(json.dumps(on_card(given.folder, given.tokenizer, given.side, given.files, CARDS[given.card])))
        return
    if given.device == "cuda":
        cards_table(given)
        return
    if given.folder:
        print(json.dumps(one_start(given.folder, given.tokenizer, given.side, without=given.stand_ins)))
        return
    print(f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print("| pairs | start | pairing, s | encoding, s | reading, s | pairs/s | peak memory, MiB | growth of it, MiB |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for pairs in given.pairs:
        with tempfile.TemporaryDirectory() as name:
            make_folders(Path(name), pairs, given.side)
            time.sleep(3)  # files written a moment ago are not stored as checked
            for start in ("first", "again"):
                row = measured(Path(name), given.tokenizer, given.side, without=given.stand_ins)
                total = row["pairing"] + row["encoding"] + row["reading"]
                seconds = " | ".join(f"{row[key]:.2f}" for key in ("pairing", "encoding", "reading"))
                memory = f"{row['peak'] / MIB:.0f} | {(row['peak'] - row['before']) / MIB:.0f}"
                print(f"| {pairs} | {start} | {seconds} | {pairs / total:.1f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
