"""Hypothesis strategies of the values that a JSON file or an API caller can send."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.support.hostile_values import HOSTILE

TEXTS = st.text() | st.text(st.characters(categories=["Cs", "Cc", "Lu"]), max_size=20)
NUMBERS = st.integers() | st.integers(-(10**400), 10**400) | st.floats()
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS | st.sampled_from(sorted(HOSTILE)).map(lambda name: HOSTILE[name])
VALUES = st.recursive(LEAVES, lambda below: st.lists(below, max_size=4) | st.dictionaries(TEXTS, below, max_size=4))
