"""Regular expressions from settings, without those that could take too long.

`re` tries all ways in which an expression can match a name, and their number can grow exponentially with the name's
length. So the number of ways is bounded before an expression is used.
"""

from __future__ import annotations

import importlib
import math
import re
import sys
from collections import Counter
from typing import Any

_PARSER: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
_LONGEST_NAME = 48  # characters; the longest name of a layer in Qwen-Image has 42
_FEW = 8
MOST_WAYS = 300_000
"""Ways to match, of all expressions in one setting. `re` tries 30,000 to 150,000 of them per millisecond."""
_NEVER = (_FEW, MOST_WAYS + 1)
_SINGLE = frozenset({"LITERAL", "NOT_LITERAL", "IN", "ANY", "AT", "FAILURE"})


def compiled(pattern: str) -> re.Pattern[str]:
    """The expression, ready to match names of layers.

    Raises:
        ValueError: it is not a regular expression, could take too long, or uses something that no name needs.
    """
    if ways_to_match(pattern) > MOST_WAYS:
        raise ValueError(
            "it could take too long to match. Use at most four of *, + and {n,}, and none around another, around "
            r"alternatives or around something that can be empty: write .* in place of (\w+\.?)+"
        )
    try:
        return re.compile(pattern)
    except (re.error, RecursionError) as error:  # the compiler refuses some that the parser accepts
        raise ValueError(f"it is not a regular expression: {error}") from error


def ways_to_match(pattern: str) -> int:
    """A bound on the number of ways in which the expression can match the beginning of a layer's name.

    Raises:
        ValueError: it is not a regular expression, or uses something that no name needs.
    """
    try:
        loops, choices = _ways(_PARSER.parse(pattern))
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"it is not a regular expression: {error}") from error
    return choices * math.comb(_LONGEST_NAME + loops, loops)  # the loops divide a part of the name among them


def _ways(parts: Any) -> tuple[int, int]:
    """Of a sequence of parts: the number of unlimited repeats, and the number of choices between them.

    Both are cut at values that are refused.
    """
    loops, choices = 0, 1
    for kind, value in parts:
        more, factor = _ways_of(kind.name, value)
        loops, choices = min(loops + more, _FEW), min(choices * factor, MOST_WAYS + 1)
    return loops, choices


def _ways_of(kind: str, value: Any) -> tuple[int, int]:
    if kind == "IN" and any(part.name == "RANGE" and bounds[1] > 127 for part, bounds in value):
        raise ValueError("it has a range of characters beyond ASCII. Names of layers are ASCII")  # slow to compile
    if kind in _SINGLE:
        return 0, 1
    if kind in ("SUBPATTERN", "ASSERT", "ASSERT_NOT"):
        return _ways(value[-1])
    if kind == "ATOMIC_GROUP":
        return _ways(value)
    if kind == "BRANCH":
        return _ways_of_branches(value[1])
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return _ways_of_repeat(*value)
    raise ValueError("it refers back to a group. Write the text of the group again")


def _ways_of_branches(branches: Any) -> tuple[int, int]:
    """The sum over alternatives that can match the same text. Those with different first letters can't."""
    found = [(_first_letter(branch), *_ways(branch)) for branch in branches]
    by_letter = Counter[str]()
    for letter, _, choices in found:
        by_letter[letter] += choices
    anywhere = by_letter.pop("", 0)
    return max(loops for _, loops, _ in found), anywhere + max(by_letter.values(), default=0)


def _first_letter(branch: Any) -> str:
    """The letter that an alternative always begins with, in lower case; empty if there are several or none."""
    letters = [value for kind, value in branch[:1] if kind.name == "LITERAL" and value < 128]
    return chr(letters[0]).lower() if letters else ""


def _ways_of_repeat(least: int, most: int, part: Any) -> tuple[int, int]:
    loops, choices = _ways(part)
    if most > 1 and part.getwidth()[0] == 0:
        return _NEVER
    if most <= _FEW:
        return min(loops * most, _FEW), sum(choices**times for times in range(least, most + 1))
    return (1, 1) if (loops, choices) == (0, 1) else _NEVER
