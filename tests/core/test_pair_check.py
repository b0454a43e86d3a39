"""The pair checker, on pairs with known offsets."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.waves import HEIGHT, WIDTH, edited, scene
from trainer_core.config import DatasetConfig, PairCheckConfig
from trainer_core.data.alignment import MIN_UNEDITED_SHARE, UNEDITED, align
from trainer_core.data.pair_check import PairCheck, check_pairs
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.demo.pictures import PAIRS
from trainer_core.errors import ConfigError, Interrupted
from trainer_core.events import SilentObserver, Stop
from trainer_core.pictures.check_report import check_report, check_sheet

CONFIG = PairCheckConfig()


OFFSETS = [(0.0, 0.0), (1.5, 0.0), (0.0, 3.0), (-3.0, 1.5)]
CASES = [(shift, *other) for shift in OFFSETS for other in ((1.0, 0), (1.01, 0), (1.0, 8), (0.99, -8))]


@pytest.mark.parametrize(("shift", "zoom", "colour"), [*CASES, ((12.0, -9.0), 1.0, 0), ((12.0, -9.0), 1.0, 8)])
def test_known_offsets_are_measured(shift: tuple[float, float], zoom: float, colour: int) -> None:
    found = align(edited().astype(np.float32), scene(0, shift, zoom, colour).astype(np.float32))
    assert found.measured
    assert found.shift == pytest.approx(shift, abs=0.1)
    assert found.zoom == pytest.approx(zoom, abs=1e-3)
    assert found.colour == pytest.approx((-colour,) * 3, abs=0.5)
    assert found.unedited == pytest.approx(0.75, abs=0.1)


def test_what_has_nothing_in_common_is_not_measured() -> None:
    plain = np.full((HEIGHT, WIDTH, 3), 90, np.float32)
    for target, reference in ((scene(1), scene(2)), (plain, plain), (255 - scene(1), scene(1))):
        found = align(target.astype(np.float32), reference.astype(np.float32))
        assert not found.measured, found.unedited


def test_what_lies_outside_a_shifted_reference_counts_as_nothing() -> None:
    """A negative of soft colours fits best at some far shift. The strip that it leaves uncovered is a fifth of 128²."""
    colours = Image.fromarray(np.random.default_rng(9).integers(0, 255, (8, 8, 3), np.uint8))
    target = np.asarray(colours.resize((128, 128), Image.Resampling.BICUBIC), np.float32)
    found = align(target, 255 - target)
    assert max(map(abs, found.shift)) > 10 and found.unedited < 0.05 and not found.measured


def test_the_plain_parts_of_a_negative_are_no_unedited_region() -> None:
    """The sky of 03_china differs from its negative by nearly one colour, in a quarter of the picture."""
    for name in ("03_china.png", "06_rocket.png", "07_china.png"):
        pixels = (np.asarray(Image.open(PAIRS / side / name), np.float32) for side in ("target", "reference"))
        found = align(*pixels)
        agrees = (found.difference < UNEDITED).mean()
        assert agrees >= MIN_UNEDITED_SHARE and max(map(abs, found.colour)) > 64
        assert found.unedited == 0 and not found.measured


@pytest.mark.parametrize(("offset", "measured"), [(60, True), (68, False)])
def test_colours_that_lie_far_apart_are_an_edit(offset: int, measured: bool) -> None:
    pixels = edited().astype(np.float32) / 2, scene(0).astype(np.float32) / 2 + offset
    found = align(*pixels)
    assert found.colour == pytest.approx((-offset,) * 3, abs=0.5)
    assert (found.measured, found.unedited > MIN_UNEDITED_SHARE) == (measured, measured)


def dataset(root: Path, pairs: dict[str, tuple[np.ndarray, np.ndarray]], captions: dict[str, str]) -> EditDataset:
    for key, (target, reference) in pairs.items():
        for part, pixels in (("after", target), ("before", reference)):
            (root / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / part / f"{key}.png")
        (root / "after" / f"{key}.txt").write_text(captions.get(key, f"turn the middle into number {key}"))
    return pair_folders(DatasetConfig(target_dir=str(root / "after"), reference_dirs=(str(root / "before"),)))


def kinds(check: PairCheck) -> dict[str, list[str]]:
    return {key: [finding.kind for finding in check.of(key)] for key in dict.fromkeys(f.key for f in check.findings)}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> EditDataset:
    """One pair for each kind of finding, and pairs without any."""
    pairs = {
        "a_good": (edited(0), scene(0)),
        "b_shifted": (edited(1), scene(1, (3.0, 0.0))),
        "c_zoomed": (edited(2), scene(2, (0.0, 0.0), 1.01)),
        "d_bright": (edited(3), scene(3, (0.0, 0.0), 1.0, 8)),
        "e_equal": (scene(4), scene(4)),
        "f_repeated": (edited(0) ^ 1, scene(0)),
        "g_framing": (edited(6), scene(6)[:, :150]),
        "h_caption": (edited(7), scene(7)),
        "i_small_shift": (edited(8), scene(8, (0.5, 0.0))),
        "j_all_new": (edited(9), scene(10)),
        "k_size": (edited(11), scene(11)[::2, ::2]),
    }
    return dataset(tmp_path_factory.mktemp("mixed"), pairs, {"h_caption": "IMG_1234"})


def test_every_kind_is_found_and_no_more(mixed: EditDataset) -> None:
    check = check_pairs(mixed, CONFIG)
    assert kinds(check) == {
        "b_shifted": ["shift"],
        "c_zoomed": ["zoom"],
        "d_bright": ["colour"],
        "e_equal": ["equal"],
        "f_repeated": ["duplicate"],
        "g_framing": ["framing"],
        "h_caption": ["caption"],
        "j_all_new": ["unmeasured"],
        "k_size": ["size"],
    }
    assert check.shifts["b_shifted", 0] == pytest.approx((3, 0), abs=0.1), "in pixels of the target"
    report = check_report(mixed, check)
    assert report.startswith(
        "Pair check: 9 of 11 pairs may have problems: 1 shifted, 1 scaled, 1 with different colours"
    )
    for words in (
        "b_shifted: the reference is shifted 3.0 px right and 0.0 px",
        "c_zoomed: the reference is 1.0",
        "red +8.0, green +8.0, blue +8.0 of 255",
        "f_repeated: is nearly identical to the pair a_good",
        "the caption says little: 'IMG_1234'",
        "k_size: the reference is 96 x 72, the target 192 x 144. Training resizes both.",
    ):
        assert words in report, report


def test_an_edit_of_the_whole_picture_is_a_note_and_no_finding_of_each_pair(tmp_path: Path) -> None:
    negatives = pair_folders(
        DatasetConfig(target_dir=str(PAIRS / "target"), reference_dirs=(str(PAIRS / "reference"),))
    )
    check = check_pairs(negatives, CONFIG)
    assert check.findings == () and len(check.notes) == 1
    assert check.notes[0].startswith("In 24 of 24 pairs, reference and target have too little in common to be aligned.")
    report = check_report(negatives, check)
    assert report.startswith("Pair check: no problems in 24 pairs.") and check.notes[0] in report
    pairs = {str(seed): (edited(seed), scene(seed, (0, 0), 1.0, 8)) for seed in range(3)}
    pairs |= {"new": (edited(8), scene(9)), "old": (edited(7), scene(7)), "twin": (edited(7) ^ 1, scene(7))}
    check = check_pairs(dataset(tmp_path, pairs, {}), CONFIG)
    assert kinds(check) == {"twin": ["duplicate"]}
    assert [note.partition(". ")[0] for note in check.notes] == [
        "In 1 of 6 pairs (new), reference and target have too little in common to be aligned",
        "In 3 of 6 pairs (0, 1, 2), reference and target differ in colour outside the edit",
    ]


def test_references_of_another_size_in_most_pairs_are_a_note(tmp_path: Path) -> None:
    pairs = {str(seed): (edited(seed), scene(seed)[::2, ::2]) for seed in range(3)} | {"equal": (edited(4), scene(4))}
    check = check_pairs(dataset(tmp_path, pairs, {}), CONFIG)
    assert kinds(check) == {}
    (note,) = check.notes
    assert note.startswith("In 3 of 4 pairs (0, 1, 2), reference and target differ in size. Training resizes both.")


def test_limits_are_settings(mixed: EditDataset) -> None:
    wide = PairCheckConfig(max_shift=5, max_zoom_percent=5, max_colour_offset=20, min_difference=0)
    assert set(kinds(check_pairs(mixed, wide))) == {"f_repeated", "g_framing", "h_caption", "j_all_new", "k_size"}
    strict = check_pairs(mixed, PairCheckConfig(max_shift=0.3))
    assert "i_small_shift" in kinds(strict)
    with pytest.raises(ConfigError, match="duplicate_bits"):
        PairCheckConfig(duplicate_bits=99)


def test_large_pictures_are_measured_small_and_told_in_their_own_pixels(tmp_path: Path) -> None:
    target, reference = (
        np.asarray(Image.fromarray(pixels).resize((4 * WIDTH, 4 * HEIGHT), Image.Resampling.BICUBIC))
        for pixels in (edited(1), scene(1, (1.0, 0.0)))
    )
    check = check_pairs(dataset(tmp_path, {"a": (target, reference)}, {}), PairCheckConfig(check_side=256))
    assert re.search(r"shifted (3\.9|4\.0|4\.1) px right", check.findings[0].text)


def red_pixels(sheet: Image.Image) -> int:
    """Number of pixels close to the colour of the frame; scaling changes it a little."""
    return int((np.abs(np.asarray(sheet).astype(int) - (235, 87, 87)) < 16).all(axis=-1).sum())


def test_the_sheet_shows_marked_pairs_first(mixed: EditDataset) -> None:
    check = check_pairs(mixed, CONFIG)
    sheet = check_sheet(mixed, check, CONFIG, max_pairs=2)
    assert sheet.width > 3 * 192 and red_pixels(sheet) > 450


def test_no_problems_and_shared_captions(tmp_path: Path) -> None:
    pairs = {str(seed): (edited(seed), scene(seed)) for seed in range(2)}
    good = dataset(tmp_path, pairs, dict.fromkeys(pairs, "turn the middle into waves"))
    check = check_pairs(good, CONFIG)
    report = check_report(good, check)
    assert report.startswith("Pair check: no problems in 2 pairs.")
    assert "all pairs have 'turn the middle into waves'" in report
    assert red_pixels(check_sheet(good, check, CONFIG)) < 360


def test_a_stop_is_heard(mixed: EditDataset) -> None:
    class Impatient(SilentObserver):
        def should_stop(self) -> Stop:
            return Stop.PAUSE

    with pytest.raises(Interrupted):
        check_pairs(mixed, CONFIG, Impatient())
