"""The pairs of the demo, which ship with the extension. `tools/demo_pairs.py` made them."""

from __future__ import annotations

import shutil
from pathlib import Path

# reference/*.png, target/*.png with a caption *.txt beside each, and held_out.txt with one pair of each photograph
PAIRS = Path(__file__).parent / "pairs"
CAPTION = "turn the photo into a colour negative"  # that of every pair


def copy_demo_pairs(folder: Path) -> None:
    """Copy the demo's pairs to `folder`/reference and `folder`/target."""
    for part in ("reference", "target"):
        (folder / part).mkdir(parents=True, exist_ok=True)
        for path in sorted((PAIRS / part).iterdir()):
            shutil.copyfile(path, folder / part / path.name)  # without the permissions: the originals may be read-only
