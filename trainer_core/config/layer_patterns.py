"""Settings for single layers: lines such as `0-9 = 8` (blocks) or `.*attn\\.to_q = 32` (a regular expression)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ..errors import ConfigError
from ..text import brief
from .regular_expression import MOST_WAYS, compiled, ways_to_match

LARGEST = 4096.0
_BLOCKS = re.compile(r"(\d+)(?:\s*-\s*(\d+))?")
_BLOCK_OF_LAYER = re.compile(r"transformer_blocks\.(\d+)\.")


@dataclass(frozen=True, slots=True)
class LayerPattern:
    """A value for the layers in `blocks`, or for those whose full name matches `name` (a full match)."""

    line: str
    value: float
    blocks: range | None
    name: re.Pattern[str] | None

    def matches(self, layer: str) -> bool:
        """Whether the pattern applies to the layer with this full name."""
        if self.name is not None:
            return self.name.fullmatch(layer) is not None
        block = _BLOCK_OF_LAYER.match(layer)
        return block is not None and self.blocks is not None and int(block.group(1)) in self.blocks


@lru_cache  # called for each of hundreds of layers
def _parsed(setting: str, lines: tuple[str, ...]) -> tuple[LayerPattern, ...]:
    patterns = tuple(_pattern(setting, line) for line in lines)
    if sum(ways_to_match(each.name.pattern) for each in patterns if each.name) > MOST_WAYS:
        raise ConfigError(
            f"The {len(lines)} lines of {setting} together take too long to match. Use fewer lines, or fewer of * "
            "and + in them."
        )
    return patterns


def layer_patterns(setting: str, lines: Sequence[str]) -> tuple[LayerPattern, ...]:
    """The parsed lines, in order. The first one that matches a layer applies.

    Raises:
        ConfigError: a line is not `blocks = number` or `pattern = number`, or the patterns take too long to match.
    """
    return _parsed(setting, tuple(lines))


def value_for(patterns: Sequence[LayerPattern], layer: str) -> float | None:
    """The value of the first pattern that matches the layer, or None."""
    return next((pattern.value for pattern in patterns if pattern.matches(layer)), None)


def _pattern(setting: str, line: str) -> LayerPattern:
    where, equals, number = (part.strip() for part in line.rpartition("="))
    try:
        value = float(number)
        blocks = _BLOCKS.fullmatch(where)
        name = None if blocks else compiled(where)
    except ValueError as error:
        raise _wrong(setting, line, f" ({error})") from error
    if not equals or not where or not 0 < value <= LARGEST:
        raise _wrong(setting, line)
    if blocks is None:
        return LayerPattern(line, value, None, name)
    first, last = int(blocks.group(1)), int(blocks.group(2) or blocks.group(1))
    if last < first:
        raise _wrong(setting, line)
    return LayerPattern(line, value, range(first, last + 1), None)


def _wrong(setting: str, line: str, reason: str = "") -> ConfigError:
    return ConfigError(
        f"Each line of {setting} must be 'blocks = number' or 'pattern = number' with a number above 0 and at most "
        rf"{LARGEST:g}, such as '0-9 = 8', '59 = 32' or '.*attn\.to_q = 32', got {brief(line)}{reason}."
    )
