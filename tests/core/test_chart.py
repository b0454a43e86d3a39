"""The loss chart."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from trainer_core.pictures.chart import loss_chart, smoothed

DRIFT = ((0xE0, 0x6C, 0x9F), (0xC3, 0xA6, 0xFF), (0x56, 0xC8, 0xC8))
VALIDATION, RATE, LOSS = (0xFF, 0xB4, 0x54), (0x8E, 0xC0, 0x7C), (0x5A, 0xA9, 0xFF)


def rows(count: int, *, validate_every: int = 0) -> list[dict[str, object]]:
    return [
        {"step": step, "loss": 1 / step, "learning_rate": 1e-4}
        | ({"validation_loss": 0.5 / step} if validate_every and step % validate_every == 0 else {})
        for step in range(1, count + 1)
    ]


def has(picture, colour) -> bool:
    return bool((np.asarray(picture) == colour).all(-1).any())


@pytest.mark.parametrize("count", [0, 1, 2, 300])
def test_any_number_of_rows(count):
    picture = loss_chart(rows(count))
    assert (picture.mode, picture.size) == ("RGB", (900, 560))
    assert has(picture, RATE) == (count > 0)
    assert has(picture, LOSS) == (count > 0)
    assert not has(picture, VALIDATION)


def test_validation_is_drawn_where_there_is_some():
    assert has(loss_chart(rows(40, validate_every=10)), VALIDATION)
    assert has(
        loss_chart([{"step": 1, "validation_loss": 0.4}, {"step": 2, "loss": 0.1, "validation_loss": 0.3}]), VALIDATION
    )


def test_drift_is_drawn_where_there_is_some():
    course = [row | {"drift_shift": 0.5, "drift_zoom": 0.1, "drift_colour": 30.0} for row in rows(3)]
    picture = loss_chart([*course, *rows(3)])
    assert all(has(picture, colour) for colour in DRIFT)
    assert not any(has(loss_chart(rows(3)), colour) for colour in DRIFT)
    assert loss_chart([{**row, "drift_shift": 0.0} for row in rows(3)]).size == (900, 560)


def test_rows_without_numbers_are_passed_over():
    broken = [
        {"step": 3},
        {"loss": 1.0},
        {"step": 4, "loss": math.nan, "learning_rate": None},
        {"step": 5, "loss": "x"},
    ]
    assert loss_chart([*rows(3), *broken]).tobytes() == loss_chart(rows(3)).tobytes()


def test_one_outlier_does_not_press_the_course_flat():
    course = rows(300)
    wild = [*course[:200], course[200] | {"loss": 1e6}, *course[201:]]
    blue = (np.asarray(loss_chart(wild)) == LOSS).all(-1)
    assert blue.any(1).sum() > 60


def test_smoothing_is_a_mean_without_a_bias_at_the_beginning():
    assert smoothed([2.0] * 5, 50) == pytest.approx([2.0] * 5)
    assert smoothed([1.0, 3.0], 1) == [1.0, 3.0]
    assert smoothed([1.0, math.nan, 1.0], 10) == pytest.approx([1.0] * 3)
    assert 1.0 < smoothed([1.0, 3.0], 10)[1] < 3.0


def test_importing_the_module_does_not_import_matplotlib():
    code = "import sys, trainer_core.pictures.chart; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
