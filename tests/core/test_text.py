"""Text from others: what is refused, and how it is cut and escaped in messages."""

from __future__ import annotations

import pytest

from tests.support.hostile_values import HOSTILE
from trainer_core.text import LONGEST_PROMPT, brief, printable, shown, text_problem


@pytest.mark.parametrize("name", HOSTILE)
def test_any_value_is_shown_briefly(name: str) -> None:
    text = brief(HOSTILE[name])
    assert 0 < len(text) <= 251
    assert text.isprintable()
    text.encode()


def test_short_values_are_shown_whole() -> None:
    for value in ("x" * 200, 2**64, {"a": [1, 2]}, None, 1e308):
        assert brief(value) == repr(value)


def test_the_size_of_a_long_value_is_said() -> None:
    assert brief("x" * 1_000_000).endswith("(1,000,000 characters)")
    assert brief(10**5_000) == "a number of about 5001 digits"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Turn the sky red. 把天空变红 \U0001f3a8", ""),
        ("", ""),
        ("x" * LONGEST_PROMPT, ""),
        ("x" * (LONGEST_PROMPT + 1), "has 20,001 characters; at most 20,000 are allowed"),
        ("ab\ud800", "half a surrogate pair at character 3"),
        ("a\0", "contains a NUL character"),
    ],
)
def test_text_that_cannot_be_used(text: str, problem: str) -> None:
    found = text_problem(text)
    assert problem in found and bool(found) == bool(problem)


def test_a_long_name_keeps_both_ends_in_a_message() -> None:
    name = "/start/" + "x" * 10_000 + "/end.png"
    assert shown(name).startswith("/start/x") and shown(name).endswith("x/end.png")
    assert len(shown(name)) == 300
    assert printable(name) == name  # for digests, where two long names must differ


def test_names_are_escaped() -> None:
    assert shown("a\n\udce9.png") == "a\\n\\udce9.png"
