"""What a mask file means: its brightness, its transparency, or the opacity of its paint; or that it is no mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from tests.support.icc import grey_profile
from tests.support.pair_files import config, pair, problems_of
from trainer_core.conditioning.encoding_plan import plan_encoding
from trainer_core.config import DatasetConfig, EncodingConfig, ModelConfig
from trainer_core.data.masks import loss_weights
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.geometry import Box, Size
from trainer_core.pictures.contact_sheet import contact_sheet, report

SIDE = 32
INSIDE = (slice(8, 24), slice(8, 24))  # a quarter of the picture


def region() -> np.ndarray:
    """255 inside, 0 outside."""
    found = np.zeros((SIDE, SIDE), np.uint8)
    found[INSIDE] = 255
    return found


def photograph() -> Image.Image:
    y, x = np.mgrid[0:SIDE, 0:SIDE] * 8
    return Image.fromarray(np.stack([x, y, (x + y) // 2], -1).astype(np.uint8))


def with_alpha(picture: Image.Image, alpha: np.ndarray) -> Image.Image:
    picture.putalpha(Image.fromarray(alpha))
    return picture


def dataset_with(root: Path, mask: Image.Image, name: str = "a.png", **options: object) -> DatasetConfig:
    pair(root, "a")
    Image.new("RGB", (SIDE, SIDE), "blue").save(root / "after/a.png")
    (root / "mask").mkdir(exist_ok=True)
    mask.save(root / "mask" / name, **options)
    return config(root, mask_dir=str(root / "mask"))


def weights(dataset: EditDataset) -> np.ndarray:
    mask = dataset.pairs[0].mask
    assert mask is not None
    return loss_weights(mask, Box(0, 0, SIDE, SIDE), Size(SIDE // 8, SIDE // 8))[0].numpy()


WEIGHTS = np.kron(np.pad([[4.0, 4.0], [4.0, 4.0]], 1), np.ones((1, 1)))
BLACK, WHITE = Image.new("RGB", (SIDE, SIDE)), Image.new("RGB", (SIDE, SIDE), "white")
KINDS = {
    "plain": (lambda: Image.fromarray(region()), "a.png", {}, ""),
    "opaque alpha": (
        lambda: with_alpha(Image.fromarray(region()).convert("RGB"), np.full_like(region(), 255)),
        "a.png",
        {},
        "",
    ),
    "half alpha": (
        lambda: with_alpha(Image.fromarray(region()).convert("RGB"), np.full_like(region(), 128)),
        "a.png",
        {},
        "",
    ),
    "jpeg": (lambda: Image.fromarray(region()).convert("RGB"), "a.jpg", {"quality": 95}, ""),
    "black paint": (lambda: with_alpha(BLACK.copy(), region()), "a.png", {}, "Painted parts count"),
    "white paint": (lambda: with_alpha(WHITE.copy(), region()), "a.png", {}, "Painted parts count"),
    "grey paint": (lambda: with_alpha(Image.new("L", (SIDE, SIDE), 90), region()), "a.png", {}, "Painted parts count"),
    "lossy paint": (
        lambda: with_alpha(Image.new("RGB", (SIDE, SIDE), "red"), region()),
        "a.webp",
        {},
        "Painted parts count",
    ),
    "hole": (lambda: with_alpha(photograph(), 255 - region()), "a.png", {}, "Transparent parts count"),
    "hole in a tiff": (lambda: with_alpha(photograph(), 255 - region()), "a.tif", {}, "Transparent parts count"),
    "hole in grey": (
        lambda: with_alpha(photograph().convert("L"), 255 - region()),
        "a.png",
        {},
        "Transparent parts count",
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_region_counts_however_the_mask_marks_it(tmp_path: Path, kind: str) -> None:
    mask, name, options, note = KINDS[kind]
    dataset = pair_folders(dataset_with(tmp_path, mask(), name, **options))
    assert np.abs(weights(dataset) - WEIGHTS).max() < (0.1 if name == "a.jpg" else 1e-6)
    notes = [each for each in dataset.notes if each.startswith("Masks")]
    assert len(notes) == (1 if note else 0)
    assert all(note in each and f": 1 (mask/{name})" in each and each in report(dataset) for each in notes)


def test_a_palette_with_a_transparent_entry_is_a_hole(tmp_path: Path) -> None:
    mask = photograph().quantize(16)
    mask.putdata(np.where(region() > 0, 15, np.asarray(mask) % 15).ravel().tolist())
    dataset = pair_folders(dataset_with(tmp_path, mask, transparency=15))
    assert np.abs(weights(dataset) - WEIGHTS).max() < 1e-6


def test_soft_edges_count_in_part(tmp_path: Path) -> None:
    alpha = np.tile(np.arange(SIDE, dtype=np.uint8) * 8, (SIDE, 1))
    expected = alpha.reshape(4, 8, 4, 8).mean((1, 3)) / alpha.mean()
    paint = pair_folders(dataset_with(tmp_path / "paint", with_alpha(BLACK.copy(), alpha)))
    assert np.abs(weights(paint) - expected).max() < 1e-5
    hole = pair_folders(dataset_with(tmp_path / "hole", with_alpha(photograph(), 255 - alpha)))
    assert np.abs(weights(hole) - expected).max() < 1e-5


def test_one_pixel_that_is_hardly_transparent_does_not_make_a_mask_a_hole(tmp_path: Path) -> None:
    alpha = np.full_like(region(), 255)
    alpha[0, 0] = 254
    dataset = pair_folders(dataset_with(tmp_path, with_alpha(Image.fromarray(region()).convert("RGB"), alpha)))
    assert np.abs(weights(dataset) - WEIGHTS).max() < 1e-6
    assert not dataset.notes


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (photograph(), "this is a coloured picture, not a mask"),
        (Image.composite(Image.new("RGB", (SIDE, SIDE), "red"), BLACK, Image.fromarray(region())), "coloured picture"),
        (with_alpha(photograph(), np.full_like(region(), 255)), "coloured picture"),
        (with_alpha(photograph(), np.zeros_like(region())), "the mask is wholly transparent"),
        (with_alpha(photograph(), region() // 100), "the mask is wholly transparent"),
        (with_alpha(photograph(), 255 - region() // 100), "coloured picture"),
        (Image.new("L", (SIDE, SIDE)), "the mask is all black"),
    ],
    ids=["photo", "red on black", "opaque", "transparent", "hardly opaque", "hardly transparent", "black"],
)
def test_what_is_no_mask_is_refused_in_the_one_report(tmp_path: Path, mask: Image.Image, words: str) -> None:
    settings = dataset_with(tmp_path, mask)
    (tmp_path / "after/a.txt").unlink()
    problems = problems_of(settings)
    assert sum(line.startswith(str(tmp_path / "mask/a.png")) and words in line for line in problems) == 1
    assert sum("no caption" in line for line in problems) == 1 or "all black" in words


def test_a_grey_jpeg_with_a_tint_of_noise_is_a_mask(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(-6, 7, (SIDE, SIDE, 3))
    noisy = (np.where(region()[..., None] > 0, 240, 10) + noise).astype(np.uint8)
    dataset = pair_folders(dataset_with(tmp_path, Image.fromarray(noisy), "a.jpg", quality=60))
    assert weights(dataset)[1:3, 1:3].min() > 3
    assert weights(dataset)[0].max() < 0.5


def test_a_colour_profile_does_not_change_the_weights(tmp_path: Path) -> None:
    plain = dataset_with(tmp_path / "a", Image.fromarray(region() // 2))
    tagged = dataset_with(tmp_path / "b", Image.fromarray(region() // 2), icc_profile=grey_profile(1.8))
    assert (weights(pair_folders(plain)) == weights(pair_folders(tagged))).all()
    assert not pair_folders(tagged).notes


def test_only_keys_of_masks_with_other_weights_than_before_change(tmp_path: Path) -> None:
    names = {}
    for kind in ("plain", "jpeg", "opaque alpha", "half alpha", "black paint", "hole"):
        mask, name, options, _ = KINDS[kind]
        pair_of = pair_folders(dataset_with(tmp_path / kind, mask(), name, **options)).pairs[0]
        names[kind] = pair_of.mask.digest.partition("+")[2]
        planned = plan_encoding(pair_of, ModelConfig(), EncodingConfig(resolution=64), ("vae", "text"), validated=False)
        assert planned.entry.mask
    unchanged = dict.fromkeys(("plain", "jpeg", "opaque alpha"), "")
    assert names == {**unchanged, "half alpha": "even", "black paint": "paint", "hole": "hole"}


def grey_photo() -> Image.Image:
    """A scene of smooth light with texture, whose weights are spread around 1."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    noise = np.random.default_rng(1).normal(0, 12, (SIDE, SIDE))
    return Image.fromarray(np.clip(60 + 120 * x * (1 - y) + 40 * np.sin(9 * y) + noise, 0, 255).astype(np.uint8))


def test_a_grey_photo_in_place_of_a_mask_is_named_with_its_weights(tmp_path: Path) -> None:
    photo = grey_photo()
    dataset = pair_folders(dataset_with(tmp_path, photo, "a.jpg"))
    with Image.open(tmp_path / "mask/a.jpg") as file:
        levels = np.sort(np.asarray(file.convert("L")).ravel())
    low, high = (levels[int(share * levels.size)] / levels.mean() for share in (0.1, 0.9))
    (note,) = dataset.notes
    assert note.startswith(
        f"Masks with many grey pixels: 1 (mask/a.jpg: weights {low:.2f} to {high:.2f}). Grey counts in"
    )
    assert "If a file is a photo, put a mask in its place." in note and note in report(dataset)
    kept = pair_folders(config(tmp_path, mask_dir=str(tmp_path / "mask")), checked_dir=tmp_path / "checked")
    assert pair_folders(config(tmp_path, mask_dir=str(tmp_path / "mask")), checked_dir=tmp_path / "checked") == kept


def feathered() -> Image.Image:
    return Image.fromarray(region()).filter(ImageFilter.GaussianBlur(1.5))


USUAL = {
    "two levels": lambda: Image.fromarray(region()),
    "zero and one": lambda: Image.fromarray(region() // 255),
    "zero and half": lambda: Image.fromarray(region() // 2),
    "all white": lambda: Image.new("L", (SIDE, SIDE), 255),
    "one grey": lambda: Image.new("L", (SIDE, SIDE), 90),
    "feathered": feathered,
    "jpeg": lambda: Image.fromarray(region()),
    "feathered hole": lambda: with_alpha(photograph(), 255 - np.asarray(feathered())),
}


@pytest.mark.parametrize("kind", USUAL)
def test_usual_masks_are_not_called_grey(tmp_path: Path, kind: str) -> None:
    dataset = pair_folders(dataset_with(tmp_path, USUAL[kind](), "a.jpg" if kind == "jpeg" else "a.png"))
    assert not [note for note in dataset.notes if "grey" in note]


def test_a_gradient_is_used_and_named(tmp_path: Path) -> None:
    gradient = np.tile(np.arange(SIDE, dtype=np.uint8) * 8, (SIDE, 1))
    dataset = pair_folders(dataset_with(tmp_path, Image.fromarray(gradient)))
    assert np.abs(weights(dataset) - gradient.reshape(4, 8, 4, 8).mean((1, 3)) / gradient.mean()).max() < 1e-5
    assert "mask/a.png: weights 0.19 to 1.81" in dataset.notes[0]


def test_the_preview_shows_the_mask_as_it_weights(tmp_path: Path) -> None:
    hole = contact_sheet(pair_folders(dataset_with(tmp_path / "hole", with_alpha(photograph(), 255 - region()))))
    paint = contact_sheet(pair_folders(dataset_with(tmp_path / "paint", with_alpha(BLACK.copy(), region()))))
    plain = contact_sheet(pair_folders(dataset_with(tmp_path / "plain", Image.fromarray(region()))))
    assert hole.tobytes() == paint.tobytes() == plain.tobytes()
    without = contact_sheet(pair_folders(config(tmp_path / "plain")))
    assert plain.width > without.width
