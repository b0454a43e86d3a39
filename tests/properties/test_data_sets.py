"""Whatever files are called, they stay in their data set; whatever is done with pairs, no picture is lost."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.data_sets import files, made
from trainer_core.data_sets import changes
from trainer_core.data_sets.folders import DataSet
from trainer_core.data_sets.moves import changing
from trainer_core.data_sets.names import SIDES, Place, clean_stem, is_one_name, places_of
from trainer_core.data_sets.reading import read_data_set
from trainer_core.errors import DatasetError

PIECES = st.sampled_from(
    ["..", "/", "\\", ".", "_before", "_after", "_0", "nul", "target", "é", "\0", " ", "C:", ".png", ".txt"]
)
NAMES = st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=8).map("".join)


@given(st.lists(NAMES, min_size=1, max_size=4), st.sampled_from(["auto", "reference", "target"]))
def test_any_name_becomes_one_name_in_a_side(names: list[str], side: str):
    for place in places_of(names, side):
        if isinstance(place, Place):
            assert place.side in SIDES
            assert is_one_name(clean_stem(place.stem) + place.suffix)


KEYS = st.sampled_from(["a", "b", "c", "s/d", "a-2"])
DOES = st.sampled_from(["match", "swap", "delete", "restore", "caption", "all"])
ACTIONS = st.lists(st.tuples(DOES, KEYS, KEYS), max_size=8)


def act(data_set: DataSet, action: str, key: str, other: str, tokens: list[str]) -> None:
    found = read_data_set(data_set)
    by_side = {side: {} for side in ("reference", "target")}
    pictures = [*found.unmatched, *(each for pair in found.pairs for each in (*pair.reference, pair.target) if each)]
    for each in pictures:
        by_side[each.side][each.file.rpartition(".")[0]] = each.file
    with changing(data_set):
        if action == "match":
            pair = ("reference", by_side["reference"].get(key, "gone"), by_side["target"].get(other, "gone"))
            changes.match(data_set, [pair])
        elif action == "swap":
            changes.swap_sides(data_set, [key])
        elif action == "delete":
            tokens.append(changes.delete(data_set, [("target", by_side["target"].get(key, "gone"))]))
        elif action == "restore" and tokens:
            changes.restore(data_set, tokens.pop())
        elif action == "caption":
            changes.write_captions(data_set, {key: f"words for {other}"})
        elif action == "all":
            changes.write_caption_of_all(data_set, f"words for {key}")


@settings(max_examples=40)
@given(ACTIONS)
def test_no_picture_is_lost_by_any_changes(actions: list[tuple[str, str, str]]):
    with tempfile.TemporaryDirectory() as folder:
        data_set = made(Path(folder).resolve(), "a", "b", "s/d")
        before, tokens = pictures_in(data_set), list[str]()
        for action, key, other in actions:
            state = files(data_set.root)
            try:
                act(data_set, action, key, other, tokens)
            except DatasetError:
                assert files(data_set.root) == state
            assert pictures_in(data_set) == before
            read_data_set(data_set)


def pictures_in(data_set: DataSet) -> Counter[bytes]:
    """The content of every picture, also in the trash."""
    return Counter(data for name, data in files(data_set.root).items() if not name.endswith(".txt"))
