"""The drift score, on pictures of known shift, zoom and colour."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from tests.support.waves import HEIGHT, WIDTH, edited, scene
from trainer_core.pictures.drift import Drift, mean_drift, measure_drift, unedited_region

CASES = [((0.0, 0.0), 1.0, 0), ((0.4, -0.3), 1.0, 0), ((3.0, 4.0), 1.0, 0), ((0.0, 0.0), 1.01, 0),
         ((0.0, 0.0), 0.99, -6), ((-1.5, 0.0), 1.0, 9)]  # fmt: skip


def shown(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels)


@pytest.mark.parametrize(("shift", "zoom", "colour"), CASES)
def test_known_drift_is_measured_beside_an_edit(shift: tuple[float, float], zoom: float, colour: int) -> None:
    """The drawn picture lacks the edit altogether, which is the worst case for a base model."""
    target, reference = shown(edited()), shown(scene())
    region = unedited_region(target, [reference])
    found = measure_drift(shown(scene(0, shift, zoom, colour)), target, region)
    assert found is not None
    assert found.shift == pytest.approx(np.hypot(*shift), abs=0.1)
    assert found.zoom == pytest.approx(abs(zoom - 1) * 100, abs=0.05)
    assert found.colour == pytest.approx(abs(colour), abs=0.5)


def test_what_happens_inside_the_edit_does_not_count() -> None:
    """Two thirds of the picture are edited and shifted by three pixels; the rest is not shifted."""
    inside = np.s_[14:130, 19:173]
    target, drawn, reference = scene(0).copy(), scene(0).copy(), scene(0)
    target[inside], drawn[inside] = scene(50)[inside], scene(50, (3.0, 0.0))[inside]
    region = unedited_region(shown(target), [shown(reference)])
    assert region is not None and not region[inside][8:-8, 8:-8].mean() > 0.2 and region[:8].mean() > 0.9
    found = measure_drift(shown(drawn), shown(target), region)
    assert found is not None and found.shift < 0.1 and found.zoom < 0.05
    without = measure_drift(shown(drawn), shown(target), None)
    assert without is not None and without.shift == pytest.approx(3, abs=0.2)


def test_large_pictures_are_told_in_their_own_pixels() -> None:
    size = (4 * WIDTH, 4 * HEIGHT)
    target, drawn = (
        shown(each).resize(size, Image.Resampling.BICUBIC) for each in (scene(1), scene(1, (1.0, 0.0), 1.0, 5))
    )
    found = measure_drift(drawn, target, None)
    assert found is not None
    assert (found.shift, found.colour) == (pytest.approx(4, abs=0.2), pytest.approx(5, abs=0.5))


def test_what_has_nothing_in_common_has_no_drift() -> None:
    assert measure_drift(shown(scene(1)), shown(scene(2)), None) is None
    assert measure_drift(shown(scene(1)), shown(scene(1)), np.zeros((HEIGHT, WIDTH), np.bool_)) is None


def test_a_whole_edit_or_another_framing_leaves_all_of_the_picture() -> None:
    target = shown(scene(1))
    for references in ([], [shown(scene(2))], [shown(scene(1)[:, :100])]):
        assert unedited_region(target, references) is None
    region = unedited_region(target, [shown(scene(1)[:, :100]), target.resize((96, 72))])
    assert region is not None and region.mean() > 0.5


def test_the_mean_is_over_what_could_be_measured() -> None:
    assert mean_drift([None, Drift(1, 0.2, 3), None, Drift(2, 0.4, 6)]) == Drift(1.5, pytest.approx(0.3), 4.5)
    assert mean_drift([None]) is None and mean_drift([]) is None
