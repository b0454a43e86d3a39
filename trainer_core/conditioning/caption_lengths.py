"""Finds captions and prompts that are longer than `tokenizer_max_length`. They are refused, never cut."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..events import SILENT, Observer, raise_if_stopped
from ..qwen_image import prompt
from ..text import beginning, shown


def too_long(
    prompts: Iterable[tuple[str, str]], limit: int, tokenizer_folder: Path, observer: Observer = SILENT
) -> Iterator[str]:
    """A problem for each prompt of more than `limit` tokens. `prompts` are places, for messages, and texts.

    Tokens are those of the text alone, without its pictures and the template. A token has at least one byte, so a text
    of at most `limit` bytes is short enough. The tokenizer is loaded only if there are longer ones.

    Raises:
        ModelFileError: the tokenizer is needed and its folder has none.
        Interrupted: the observer asked to stop.
    """
    tokenizer = None
    counted: dict[str, int] = {}
    for place, text in prompts:
        if _bytes(text) <= limit:
            continue
        raise_if_stopped(observer)
        if text not in counted:
            tokenizer = tokenizer or prompt.load_tokenizer(tokenizer_folder)
            counted[text] = len(tokenizer(text)["input_ids"])
        if counted[text] > limit:
            yield (
                f"{shown(place)}: {beginning(text)} has {counted[text]:,} tokens; tokenizer_max_length allows "
                f"{limit:,}. Shorten it."
            )


def _bytes(text: str) -> int:
    """Bytes of the text as the tokenizer takes it. Composing characters can make it longer."""
    return len(unicodedata.normalize("NFC", text).encode())
