"""Patterns of layer names in workflows: matched in a short time, or refused with what to write instead."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.limits import result_or_own_error
from trainer_core.config import LoraConfig
from trainer_core.config.layer_patterns import layer_patterns, value_for
from trainer_core.errors import ConfigError

NAMES = [
    f"transformer_blocks.{block}.{layer}"
    for block in range(60)
    for layer in (
        *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")),
        "img_mlp.net.0.proj",
    )
]
LONGEST = ("time_text_embed.timestep_embedder.linear_1", "transformer_blocks.59.attn.add_q_proj", "a" * 42)
NEVER = (
    r"it could take too long to match. Use at most four of *, + and {n,}, and none around another, around alternatives"
)
NEVER_ENDING = [
    r"(\w+\.?)+!",
    r"(.*)*!",
    r"(a|a|.)*!",
    r"(.?){40}!",
    r"(?:.|..){40}!",
    r"(?=(\w+)+!).*",
    r"(?i)(?:i|\u0131x?)*!",
    r"(?:\b){1000000000}",
    ".*" * 5 + "!",
    ".?" * 30 + "!",
]
_PIECE = st.sampled_from(["a", "t", r"\.", ".", r"\w", "[^!]", "_", "transformer_blocks", r"\b", "$", ""])
_REPEAT = st.sampled_from(["", "", "*", "+", "?", "*?", "{2}", "{3,}", "{1,3}", "{20}", "{0,50}"])


def _larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    parts = st.lists(st.tuples(inner, _REPEAT).map(lambda each: f"(?:{each[0]}){each[1]}"), min_size=1, max_size=4)
    return parts.map("".join) | st.lists(inner, min_size=2, max_size=3).map("|".join) | inner.map("(?={}).*".format)


@given(
    st.recursive(_PIECE, _larger, max_leaves=12), st.sampled_from(LONGEST) | st.text("at.", min_size=48, max_size=48)
)
def test_every_pattern_is_matched_in_a_short_time_or_refused(pattern: str, name: str) -> None:
    def matched() -> bool:
        lora = LoraConfig(rank_pattern=(f"{pattern} = 4",), lora_targets="pattern", lora_target_pattern=f"{pattern}!")
        return [re.fullmatch(lora.lora_target_pattern, name), lora.rank_of(name)] == [None, 4]

    result_or_own_error(matched, seconds=0.5)


@pytest.mark.parametrize("pattern", NEVER_ENDING)
def test_a_pattern_that_could_take_for_ever_is_refused_at_once(pattern: str) -> None:
    for setting in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ConfigError, match=re.escape(NEVER)):
            layer_patterns(setting, (f"{pattern} = 8",))
    error = result_or_own_error(lambda: LoraConfig(lora_targets="pattern", lora_target_pattern=pattern), seconds=0.5)
    assert NEVER in str(error)
    assert str(error).startswith(f"lora_target_pattern {pattern!r} is wrong: ")


def test_lines_that_take_too_long_only_together_are_refused() -> None:
    lines = [f".*.*.*{number}! = 8" for number in range(100)]
    assert len(layer_patterns("rank_pattern", lines[:14])) == 14
    with pytest.raises(ConfigError, match=r"The 100 lines of alpha_pattern together take too long to match. Use fewer"):
        layer_patterns("alpha_pattern", lines)
    blocks = [rf"transformer_blocks\.{number}\.attn\..* = 8" for number in range(1000)]
    assert len(layer_patterns("rank_pattern", blocks)) == 1000


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r".*attn\.to_q", 60),
        (r".*blocks.*attn.*to_.*", 240),
        (r"(?:.*\.)?(?:to_q|to_k|to_v|to_out\.0|add_q_proj)", 300),
        (r"transformer_blocks\.([0-9]|[1-5]\d)\.(attn\.(to_q|to_k)|img_mlp\..*)", 180),
        (r"(?i)(?!.*ATTN).*proj", 60),
        (r"(?:transformer_|blocks|\.)*\d+\.attn.*", 300),
        (r"(?:\w+\.){3}\w+", 240),
        (r".*(?<=out)\.0", 60),
    ],
)
def test_usual_patterns_match_the_same_layers_as_re(pattern: str, count: int) -> None:
    parsed = layer_patterns("rank_pattern", (f"{pattern} = 8",))
    assert sum(value_for(parsed, name) == 8 for name in NAMES) == count


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "it is not a regular expression: missing ), unterminated subpattern at position 0"),
        ("a{99999999999999}", "it is not a regular expression: the repetition number is too large"),
        ("(" * 2000 + ")" * 2000, "it is not a regular expression: "),
        ("(?<=a*)b", "it is not a regular expression: look-behind requires fixed-width pattern"),
        (r"(\w)\1", "it refers back to a group. Write the text of the group again"),
        ("[\\0-\\U0010ffff]", "it has a range of characters beyond ASCII. Names of layers are ASCII"),
    ],
)
def test_a_pattern_that_cannot_be_used_says_why(pattern: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        LoraConfig(lora_targets="pattern", lora_target_pattern=pattern)
    with pytest.raises(ConfigError, match=re.escape(reason)):
        LoraConfig(rank_pattern=(f"{pattern} = 4",))
