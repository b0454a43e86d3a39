"""Where files belong by their names, and how these are cleaned."""

from __future__ import annotations

import pytest

from trainer_core.data_sets.names import Place, clean_stem, places_of


@pytest.mark.parametrize(
    ("names", "places"),
    [
        (["a_before.png", "a_after.png"], ["reference/a", "target/a"]),
        (["a_0.png", "a_1.png"], ["reference/a", "target/a"]),
        (["a.png", "a_0.png", "a_1.png", "a_2.png"], ["target/a", "reference/a", "reference_2/a", "reference_3/a"]),
        (["a_start.png", "a_start2.png", "a_end.png"], ["reference/a", "reference_2/a", "target/a"]),
        (["a.png", "a_edited.png"], ["reference/a", "target/a"]),
        (["a-source.jpg", "a target.jpg"], ["reference/a", "target/a"]),
        (["x/before/a.png", "x/after/a.png", "x/after/a.txt"], ["reference/a", "target/a", "target/a"]),
        (["control_2\\a.png", "results\\b\\a.png"], ["reference_2/a", "target/b_a"]),
        (["a_after.txt", "a.txt", "a_after.png.txt"], ["target/a", "target/a", "target/a"]),
    ],
)
def test_sides_by_name(names: list[str], places: list[str]):
    found = [place for place in places_of(names) if isinstance(place, Place)]
    assert [f"{place.side}/{place.stem}" for place in found] == places


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("IMG_20.png", "before or after"),
        ("a.png", "before or after"),
        ("a_0.svg", "extension"),
        ("a.html", "extension"),
        ("a", "extension"),
        ("a_start7.png", "three references"),
        (".hidden.png", ""),
        ("__MACOSX/a_before.png", ""),
        ("", ""),
        ("..", ""),
    ],
)
def test_names_without_a_side(name: str, said: str):
    (found,) = places_of([name])
    assert isinstance(found, str)
    assert said in found
    assert bool(found) == bool(said)


def test_a_side_that_is_given_keeps_names_as_they_are():
    names = ["IMG_1.png", "a_in.png", "a_after.png", "a_before.png"]
    assert [place.stem for place in places_of(names, "reference") if isinstance(place, Place)] == [
        "IMG_1",
        "a_in",
        "a_after",
        "a",
    ]


@pytest.mark.parametrize(
    ("stem", "cleaned"),
    [
        ("a", "a"),
        ("é", "é"),
        ("e\u0301", "é"),
        ("猫 1", "猫 1"),
        ("a/b\\c:d", "a_b_c_d"),
        ("..", "picture"),
        ("...a. .", "a"),
        ("nul", "_nul"),
        ("COM1.x", "_COM1.x"),
        ("a\0b\nc", "abc"),
        ("a\u202egnp", "agnp"),
        ("\ud800", "picture"),
        ("<img src=x onerror=alert(1)>", "_img src=x onerror=alert(1)_"),
        ("x" * 500, "x" * 120),
        ("猫" * 100, "猫" * 40),
    ],
)
def test_cleaned_names(stem: str, cleaned: str):
    assert clean_stem(stem) == cleaned
