"""Checking many pairs: on small pictures, from memory, stopped at once, and without comparing all with all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support.waves import HEIGHT, WIDTH, edited, scene
from trainer_core.config import DatasetConfig, PairCheckConfig
from trainer_core.data import duplicates, in_threads, pair_check, pair_memory
from trainer_core.data.alignment import align
from trainer_core.data.images import open_picture, open_reduced
from trainer_core.data.pair_check import PairCheck, check_pairs, measure_pair
from trainer_core.data.pairing import EditDataset, pair_folders
from trainer_core.errors import Interrupted
from trainer_core.events import SilentObserver, Stop

CONFIG = PairCheckConfig()
TIMES = 4  # the pictures are so many times larger than the scene


def dataset(root: Path, shifts: dict[str, float], suffix: str = "jpg") -> EditDataset:
    """A pair for each shift to the right in pixels of the file, at a size that no JPEG scale divides."""
    size = (TIMES * WIDTH - 3, TIMES * HEIGHT - 5)
    for number, (key, shift) in enumerate(shifts.items()):
        for part, pixels in (("after", edited(number)), ("before", scene(number, (shift / TIMES, 0.0)))):
            (root / part).mkdir(exist_ok=True)
            large = Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC)
            large.save(root / part / f"{key}.{suffix}", quality=95)
        (root / "after" / f"{key}.txt").write_text(f"turn the middle into number {key}")
    return pair_folders(DatasetConfig(target_dir=str(root / "after"), reference_dirs=(str(root / "before"),)))


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_the_findings_are_those_of_the_full_measurement(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only doubtful pairs are measured in full."""
    full: list[str] = []

    def counted(pair, config):
        full.append(pair.key)
        return measure_pair(pair, config)

    pairs = dataset(tmp_path, {"a": 0.0, "b": 0.2, "c": 0.7, "d": 0.9, "e": 6.0}, suffix)
    monkeypatch.setattr(pair_check, "measure_pair", counted)
    check = check_pairs(pairs, CONFIG)
    wanted = {pair.key: measure_pair(pair, CONFIG) for pair in pairs.pairs}
    assert {key: [each.text for each in check.of(key)] for key in wanted} == {
        key: [finding.text for finding in each.findings] for key, each in wanted.items()
    }
    assert [finding.key for finding in check.findings] == ["d", "e"]
    assert {"d", "e"} <= set(full) <= {"c", "d", "e"}
    for key in "ab":  # measured small, and told in pixels of the target as well
        full_shift = wanted[key].alignments[0].shift[0] * wanted[key].scale
        assert check.shifts[key, 0][0] == pytest.approx(full_shift, abs=0.1)
    assert check.shifts["e", 0][0] == pytest.approx(6, abs=0.2)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_reduced_jpeg_shows_the_same_place(tmp_path: Path, mode: str, orientation: int) -> None:
    """Also where its sides are not multiples of what its decoder scales by, and turned as its EXIF data say."""
    picture = Image.fromarray(scene(1)).resize((701, 459), Image.Resampling.BICUBIC).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture.save(tmp_path / "a.jpg", quality=95, exif=exif)
    reduced = open_reduced(tmp_path / "a.jpg", 128, convert=True)
    whole = open_picture(tmp_path / "a.jpg").resize(reduced.size, Image.Resampling.LANCZOS)
    assert max(reduced.size) == 128
    found, _ = pair_check.estimate(np.asarray(whole, np.float32), np.asarray(reduced, np.float32))
    assert max(map(abs, found.shift)) < 0.02 and abs(found.zoom - 1) < 5e-4


def test_a_second_check_opens_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It gives the same, and only pairs whose pictures or limits changed are measured again."""
    pairs, memory = dataset(tmp_path, {"a": 0.0, "b": 3.0, "c": 0.1}), tmp_path / "checked"
    first = check_pairs(pairs, CONFIG, checked_dir=memory)
    opened: list[Path] = []

    def counted(path: Path, *arguments: int, **named: bool) -> Image.Image:
        opened.append(path)
        return open_reduced(path, *arguments, **named)

    monkeypatch.setattr(pair_check, "open_reduced", counted)
    again = check_pairs(pairs, CONFIG, checked_dir=memory)
    assert opened == [] and same(first, again)
    Image.fromarray(scene(9)).save(tmp_path / "before" / "c.jpg")
    changed = pair_folders(
        DatasetConfig(target_dir=str(tmp_path / "after"), reference_dirs=(str(tmp_path / "before"),))
    )
    check_pairs(changed, CONFIG, checked_dir=memory)
    assert {path.stem for path in opened} == {"c"}
    opened.clear()
    check_pairs(changed, PairCheckConfig(max_shift=5), checked_dir=memory)
    assert {path.stem for path in opened} == {"a", "b", "c"}


def same(one: PairCheck, other: PairCheck) -> bool:
    return (one.findings, one.shifts) == (other.findings, other.shifts)


@pytest.mark.parametrize("content", ["", "[]", "null", "{", '{"x": 1}', "[" * 9000])
def test_a_damaged_memory_counts_as_empty(tmp_path: Path, content: str) -> None:
    pairs, memory = dataset(tmp_path, {"a": 0.0}), tmp_path / "checked"
    wanted = check_pairs(pairs, CONFIG, checked_dir=memory)
    pair_memory.memory_file(memory, pairs).write_text(content)
    assert same(check_pairs(pairs, CONFIG, checked_dir=memory), wanted)


def test_a_memory_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "checked").write_text("a file where the folder would be")
    pairs = dataset(tmp_path, {"a": 0.0})
    assert check_pairs(pairs, CONFIG, checked_dir=tmp_path / "checked").num_pairs == 1


class StopsWhen(SilentObserver):
    """Asks to stop once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def should_stop(self) -> Stop:
        return Stop.PAUSE if self.event.is_set() else Stop.NO


def test_a_stop_does_not_wait_for_work_that_takes_long() -> None:
    """The thread is busy until the stop was heard. If the stop waited for it, this would hang."""
    finish, started = threading.Event(), threading.Event()

    def work(_: int) -> None:
        started.set()
        finish.wait()

    try:
        with pytest.raises(Interrupted):
            list(in_threads.in_threads(work, range(100), StopsWhen(started), "test"))
    finally:
        finish.set()


def test_results_come_in_order_and_few_are_made_ahead() -> None:
    made: list[int] = []

    def work(number: int) -> int:
        made.append(number)
        return 2 * number

    found = in_threads.in_threads(work, range(1000), SilentObserver(), "test")
    assert [next(found) for _ in range(3)] == [(0, 0), (1, 2), (2, 4)]
    found.close()
    assert len(made) < 100


def test_what_was_measured_before_a_stop_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs, memory = dataset(tmp_path, dict.fromkeys("abcdef", 0.0)), tmp_path / "checked"

    class AfterThree(SilentObserver):
        done = 0

        def on_progress(self, text: str, done: int, total: int) -> None:
            self.done = done

        def should_stop(self) -> Stop:
            return Stop.PAUSE if self.done >= 3 else Stop.NO

    with pytest.raises(Interrupted):
        check_pairs(pairs, CONFIG, AfterThree(), checked_dir=memory)
    keys = [pair_memory.memory_key(pair, CONFIG) for pair in pairs.pairs]
    kept = pair_memory.recall(pair_memory.memory_file(memory, pairs), keys)
    assert list(kept) == keys[:3]


@pytest.mark.parametrize("most", [0, 6, 11, 12, 40])
def test_near_duplicates_are_those_of_comparing_all_with_all(most: int) -> None:
    rng = np.random.default_rng(most)
    kinds = rng.integers(0, 2, (12, 128)).astype(bool)
    hashes = [kinds[number] ^ (rng.random(128) < 0.05) for number in rng.integers(0, 12, 150)]
    hashes[7] = hashes[90] = np.zeros(128, bool)
    hashes[100] = hashes[40].copy()
    wanted: dict[int, int] = {}
    for number in range(1, len(hashes)):
        apart = [int((hashes[number] ^ each).sum()) if each.any() else 999 for each in hashes[:number]]
        if hashes[number].any() and min(apart) <= most:
            wanted[number] = apart.index(min(apart))
    assert duplicates.near_duplicates(hashes, most) == wanted and 100 in wanted


def test_near_duplicates_compare_only_hashes_with_an_equal_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Among 4,000 random hashes, a thousandth of all comparisons."""
    compared = 0
    candidates = duplicates._candidates

    def counted(bits: duplicates.Bits, parts: int):
        nonlocal compared
        for group in candidates(bits, parts):
            compared += len(group) ** 2
            yield group

    monkeypatch.setattr(duplicates, "_candidates", counted)
    hashes = list(np.random.default_rng(0).integers(0, 2, (4000, 128)).astype(bool))
    assert duplicates.near_duplicates(hashes, CONFIG.duplicate_bits) == {}
    assert compared < 4000**2 / 1000


@pytest.mark.skipif(os.name == "nt", reason="Windows file names are always Unicode")
def test_results_are_kept_below_a_folder_whose_name_is_no_unicode(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    monkeypatch.chdir(folder)
    check_pairs(dataset(Path(), {"a": 0.0}), CONFIG, checked_dir=tmp_path / "checked")
    assert len(list((tmp_path / "checked").glob("pairs-*.json"))) == 1


def test_a_region_between_the_sampled_pixels_is_compared(recwarn: pytest.WarningsRecorder) -> None:
    """The row is no multiple of the distance of sampled rows. Its median was NaN, with a warning of numpy."""
    picture = np.asarray(Image.fromarray(scene(1)).resize((400, 300)), np.float32)
    row = np.zeros(picture.shape[:2], bool)
    row[151] = True
    found = align(picture, picture, row)
    assert found.shift == pytest.approx((0, 0), abs=1e-3) and found.unedited == 1 and not recwarn.list
