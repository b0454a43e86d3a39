"""Makes the demo's pairs from photographs in installed packages: `python -m tools.demo_pairs`.

The pairs are stored in trainer_core/demo/pairs, because a user has neither scikit-image nor scikit-learn. Their edit is
one that the demo model can't do before it is trained.
"""

from __future__ import annotations

import importlib.util
from itertools import zip_longest
from pathlib import Path

from PIL import Image, ImageOps, ImageStat

from trainer_core.data.images import open_picture
from trainer_core.demo.pictures import CAPTION, PAIRS

NUM_PAIRS, SIDE = 24, 128  # side in pixels

# (import name, picture folder in the package)
_SCIKIT_IMAGE = ("skimage", "data")
_SCIKIT_LEARN = ("sklearn", "datasets/images")
_MATPLOTLIB = ("matplotlib", "mpl-data/sample_data")

# The demo's pairs are disjoint tiles of these. Pre-training never sees them. LICENCES.md beside the pairs names them.
DEMO_PHOTOGRAPHS: dict[str, tuple[str, str]] = {
    "chelsea.png": _SCIKIT_IMAGE,
    "flower.jpg": _SCIKIT_LEARN,
    "rocket.jpg": _SCIKIT_IMAGE,
    "china.jpg": _SCIKIT_LEARN,
}
# Used only for pre-training.
PRETRAINING_PHOTOGRAPHS: dict[str, tuple[str, str]] = dict.fromkeys(
    (
        "astronaut.png",
        "brick.png",
        "camera.png",
        "cell.png",
        "clock_motion.png",
        "coffee.png",
        "coins.png",
        "color.png",
        "grass.png",
        "gravel.png",
        "hubble_deep_field.jpg",
        "ihc.png",
        "moon.png",
        "motorcycle_left.png",
        "motorcycle_right.png",
        "page.png",
        "retina.jpg",
    ),
    _SCIKIT_IMAGE,
)
PRETRAINING_PHOTOGRAPHS["grace_hopper.jpg"] = _MATPLOTLIB

_LARGEST_TILE, _SMALLEST_TILE = 300, 48
_LEAST_DEVIATION = 20.0  # of 255; a flatter tile, such as plain sky, is useless for training and validation


def photograph(name: str) -> Image.Image:
    """One of the photographs in sRGB without its metadata, read from the installed package.

    Raises:
        FileNotFoundError: the package that ships it is not installed.
    """
    module, folder = {**DEMO_PHOTOGRAPHS, **PRETRAINING_PHOTOGRAPHS}[name]
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"The photograph {name} comes with {module}: pip install -r requirements-dev.txt")
    return open_picture(Path(spec.origin).parent / folder / name)


def make_demo_pairs(folder: Path) -> None:
    """Write `folder`/reference/*.png, and `folder`/target/*.png with *.txt captions.

    Pairs are tiles that don't overlap, so a held-out pair shares no pixel with the others. The first pairs by name
    come from different photographs. Every call writes the same pictures.

    Raises:
        FileNotFoundError: scikit-image or scikit-learn is not installed.
    """
    for part in ("reference", "target"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    for number, (name, tile) in enumerate(demo_tiles(NUM_PAIRS)):
        reference = tile.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        stem = f"{number:02d}_{name}"
        reference.save(folder / "reference" / f"{stem}.png", optimize=True)
        edit(reference).save(folder / "target" / f"{stem}.png", optimize=True)
        (folder / "target" / f"{stem}.txt").write_text(CAPTION + "\n", encoding="utf-8", newline="\n")


def edit(picture: Image.Image) -> Image.Image:
    """The demo's edit: a colour negative, which is not among the edits of the pre-training."""
    return ImageOps.invert(picture)


def demo_tiles(num_pairs: int) -> list[tuple[str, Image.Image]]:
    """(photograph's name, tile) pairs: the largest squares that give `num_pairs` tiles without overlap.

    Raises:
        ValueError: the photographs don't have that many tiles.
        FileNotFoundError: scikit-image or scikit-learn is not installed.
    """
    photographs = {name.split(".")[0]: photograph(name) for name in DEMO_PHOTOGRAPHS}
    for side in range(_LARGEST_TILE, _SMALLEST_TILE - 1, -4):
        rows = [[(name, tile) for tile in _tiles(picture, side)] for name, picture in photographs.items()]
        if sum(map(len, rows)) >= num_pairs:
            mixed = [entry for entries in zip_longest(*rows) for entry in entries if entry is not None]
            return mixed[:num_pairs]
    raise ValueError(f"the photographs have fewer than {num_pairs} tiles")


def _tiles(picture: Image.Image, side: int) -> list[Image.Image]:
    """The squares of a centred grid, without those that are nearly flat."""
    columns, rows = picture.width // side, picture.height // side
    left, top = (picture.width - columns * side) // 2, (picture.height - rows * side) // 2
    corners = [(left + column * side, top + row * side) for row in range(rows) for column in range(columns)]
    tiles = [picture.crop((x, y, x + side, y + side)) for x, y in corners]
    return [tile for tile in tiles if sum(ImageStat.Stat(tile).stddev) / 3 >= _LEAST_DEVIATION]


if __name__ == "__main__":
    make_demo_pairs(PAIRS)
