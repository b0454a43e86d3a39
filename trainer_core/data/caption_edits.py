"""Changes of captions before they are encoded: texts that are taken out, and variants with another order of tags."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

import torch

from ..config import CaptionConfig
from ..rng import stream
from ..text import is_blank

_SEPARATORS = {"comma": ",", "space": " ", "period": "."}


def edited(captions: Iterable[str], settings: CaptionConfig) -> tuple[str, ...]:
    """The captions without what caption_filter_list takes out, each followed by its shuffled variants.

    A caption of which nothing is left is left out, so there may be none.
    """
    filters = [_parsed(line) for line in settings.caption_filter_list]
    filtered = (_filtered(caption, filters) for caption in captions)
    return tuple(each for caption in filtered if not is_blank(caption) for each in shuffled(caption, settings))


def shuffled(caption: str, settings: CaptionConfig) -> list[str]:
    """The caption and up to caption_shuffle_count variants of it. Two tags or more must follow the fixed ones."""
    if settings.caption_shuffle_count == 0:
        return [caption]
    separator = _SEPARATORS[settings.caption_shuffle_split_on]
    tags = [tag.strip() for tag in caption.split(separator) if tag.strip()]
    fixed, others = tags[: settings.caption_shuffle_position_start], tags[settings.caption_shuffle_position_start :]
    if len(others) < 2:
        return [caption]
    found = dict.fromkeys([caption] if settings.caption_shuffle_include_original else [])
    end = separator if separator == "." and caption.rstrip().endswith(separator) else ""
    for number in range(settings.caption_shuffle_count):
        generator = stream(settings.caption_shuffle_seed, "caption shuffle", f"{number} {caption}")
        order = torch.randperm(len(others), generator=generator).tolist()
        found[f"{separator.strip()} ".join([*fixed, *(others[at] for at in order)]) + end] = None
    return list(found)


class _Filter(NamedTuple):
    """What is replaced: these texts in this order with anything between them, on one line."""

    texts: tuple[str, ...]
    at_start: bool
    at_end: bool
    replacement: str = ""
    only_first: bool = False


def _parsed(line: str) -> _Filter:
    """The filter of a line: a text, or s/text/replacement/. `^` and `$` are the caption's ends, `.*` is anything."""
    parts = line[2:].removesuffix("/").split("/") if line.startswith("s/") else []
    search, replacement = parts if len(parts) == 2 else (line, "")
    texts = search.removeprefix("^").removesuffix("$").split(".*")
    return _Filter(tuple(texts), search.startswith("^"), search.endswith("$"), replacement, len(parts) == 2)


def _filtered(caption: str, filters: Iterable[_Filter]) -> str:
    """The caption after all filters, without the double spaces that they leave."""
    before = caption
    for each in filters:
        caption = _replaced(caption, each)
    return caption if caption == before else re.sub(" {2,}", " ", caption).strip()


def _replaced(caption: str, wanted: _Filter) -> str:
    lines = caption.split("\n")
    for number, line in enumerate(lines):
        done, at = "", 0
        while span := _found(line, at, wanted, is_first=number == 0, is_last=number == len(lines) - 1):
            done, at = done + line[at : span[0]] + wanted.replacement, span[1]
            if wanted.only_first:
                break
        lines[number] = done + line[at:]
        if at and wanted.only_first:
            break
    return "\n".join(lines)


def _found(line: str, at: int, wanted: _Filter, *, is_first: bool, is_last: bool) -> tuple[int, int] | None:
    """Begin and end of the first longest match in a line of a caption from `at` on. Takes linear time."""
    begin_text, *others = wanted.texts
    if (wanted.at_start and (at or not is_first)) or (wanted.at_end and not is_last):
        return None
    if wanted.at_end and not others:
        begin = max(at, len(line) - len(begin_text))
    else:
        begin = 0 if wanted.at_start else line.find(begin_text, at)
    if begin < 0 or (wanted.at_start and begin > 0) or not line.startswith(begin_text, begin):
        return None
    end = begin + len(begin_text)
    for number, text in enumerate(others, 1):
        is_end = number == len(others)
        found = line.rfind(text, end) if is_end else line.find(text, end)
        if found < 0 or (is_end and wanted.at_end and found + len(text) < len(line)):
            return None
        end = found + len(text)
    return (begin, end) if end > begin else None
