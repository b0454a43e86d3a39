"""Seconds that `check` takes for many pairs, the first time and again.

    python -m benchmarks.check_pairs 1000 512 jpg

Makes the pairs in a temporary folder: smooth random scenes, and targets that are edited in a ninth of their area. One
pair in a hundred is shifted.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from trainer_core.config import DatasetConfig, PairCheckConfig
from trainer_core.data.pair_check import check_pairs
from trainer_core.data.pairing import pair_folders
from trainer_core.events import SILENT


def make_pairs(root: Path, count: int, side: int, suffix: str) -> DatasetConfig:
    """Writes `count` pairs of square pictures with `side` pixels."""
    for name in ("target", "reference"):
        (root / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(count):
        layers = (rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8) for cells in (6, 24, 64))
        wide = side + 8
        drawn = [np.asarray(Image.fromarray(each).resize((wide, wide)), dtype=np.float32) for each in layers]
        scene = (0.5 * drawn[0] + 0.3 * drawn[1] + 0.2 * drawn[2]).astype(np.uint8)
        reference, moved = scene[4:-4, 4:-4], 4 + 3 * (number % 100 == 0)
        target = scene[4:-4, moved : moved + side].copy()
        third = side // 3
        target[third : 2 * third, third : 2 * third] = 255 - target[third : 2 * third, third : 2 * third]
        for name, pixels in (("target", target), ("reference", reference)):
            Image.fromarray(pixels).save(root / name / f"{number:06d}.{suffix}", quality=92)
        (root / "target" / f"{number:06d}.txt").write_text(f"turn the middle into its negative, number {number}")
    return DatasetConfig(target_dir=str(root / "target"), reference_dirs=(str(root / "reference"),))


def main() -> None:
    """Makes pairs, and prints the seconds of pairing and checking them, first and again."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("side", type=int)
    parser.add_argument("suffix", choices=("jpg", "png"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        config = make_pairs(root, options.count, options.side, options.suffix)
        for name in ("first", "again"):
            start = time.perf_counter()
            dataset = pair_folders(config, checked_dir=root / "checked")
            paired, used = time.perf_counter(), time.process_time()
            check = check_pairs(dataset, PairCheckConfig(), SILENT, checked_dir=root / "checked")
            seconds, processor = time.perf_counter() - paired, time.process_time() - used
            kinds = dict(Counter(finding.kind for finding in check.findings))
            sys.stdout.write(
                f"{name}: pairing {paired - start:.1f} s, checking {seconds:.1f} s ({processor:.1f} s of processor), "
                f"findings {kinds}\n"
            )


if __name__ == "__main__":
    main()
