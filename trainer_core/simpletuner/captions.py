"""Import where captions come from and what is changed in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..config import CaptionConfig
from ..config.dataset import CAPTION_TABLES
from ..errors import ConfigError
from ..settings import limits_of
from ..text import brief, shown
from .backends import Backends
from .keys import TABLE_REASONS
from .section import Section

_SPLITS = ("comma", "space", "period")
_SPECIAL = re.compile(r"[][()*+?{}|\\]")  # in regular expressions, beside ^, $ and .*


def read_captions(backends: Backends, section: Section, dataset: dict[str, Any], root: Path) -> None:
    """Put caption_strategy and its settings into the JSON of a data set."""
    strategy = _strategy(section)
    prompts = _instance_prompts(section)
    section.knows("parquet", "csv_file", "csv_caption_column")  # read only with their caption_strategy
    captions: dict[str, Any] = {}
    table = section.inside("parquet") if strategy == "parquet" else None
    if table is not None:
        columns = {key: table.text(key) for key in ("caption_column", "filename_column", "fallback_caption_column")}
        captions = {"caption_file": table.text("path") or "", **{key: name for key, name in columns.items() if name}}
        strategy = "jsonl" if captions["caption_file"].endswith((".jsonl", ".json")) else "parquet"
        section.note("parquet.path", "a relative path starts at the target folder.")
        table.explain(TABLE_REASONS)
    if strategy == "csv":
        file, column = section.path(root, "csv_file"), section.text("csv_caption_column")
        captions = {"caption_file": file}
        captions |= {"caption_column": column} if column else {}
    if strategy in CAPTION_TABLES and (fallback := section.text("fallback_caption_column")):
        captions["fallback_caption_column"] = fallback
    section.knows("fallback_caption_column")
    for key in ("disable_multiline_split", "prepend_instance_prompt"):
        if section.truth(key):
            captions[key] = True
    dataset["caption_strategy"] = strategy
    if prompts and (strategy == "instanceprompt" or captions.get("prepend_instance_prompt")):
        dataset["instance_prompt"], *others = prompts
        if others and strategy == "instanceprompt":
            captions["more_instance_prompts"] = others
        elif others:
            section.note("instance_prompt", "is a list; the first prompt is put before the captions.")
    captions |= _shuffle(section) | _filters(backends, section)
    if captions:
        dataset["captions"] = captions


def _strategy(section: Section) -> str:
    strategy = section.text("caption_strategy")
    strategy = {"instance_prompt": "instanceprompt"}.get(strategy or "", strategy)
    if not strategy:
        strategy = "filename"
        why = (
            "null, which is no caption in SimpleTuner. Every pair needs an edit instruction here, so"
            if section.is_null("caption_strategy")
            else "not given, so filename, SimpleTuner's default:"
        )
        section.note("caption_strategy", f"{why} captions are the file names.")
    return "instanceprompt" if section.truth("only_instance_prompt") else strategy


def _instance_prompts(section: Section) -> list[Any]:
    """The prompts that are not blank. SimpleTuner takes one or a list."""
    given = section.take("instance_prompt")
    prompts = given if isinstance(given, list) else [given]
    return [each for each in prompts if each is not None and str(each).strip()]


def _shuffle(section: Section) -> dict[str, Any]:
    """caption_shuffle, if it is enabled."""
    shuffle = section.inside("caption_shuffle")
    if shuffle is None:
        return {}
    enabled, count = shuffle.truth("enable"), shuffle.whole("count")
    values: dict[str, Any] = {"count": 1 if count is None else count, "split_on": shuffle.text("split_on")}
    values |= {key: shuffle.whole(key) for key in ("seed", "position_start")}
    values["include_original"] = shuffle.truth("include_original")
    if not enabled or values["count"] < 1:
        shuffle.explain({})
        return {}
    most = limits_of(CaptionConfig, "caption_shuffle_count").max
    if most is not None and values["count"] > most:
        shuffle.note("count", f"{brief(count)} becomes {most:g}, the highest number here.")
        values["count"] = int(most)
    if values["split_on"] not in (None, *_SPLITS):
        shuffle.note("split_on", f"{brief(values['split_on'])} is unknown; comma is used, as in SimpleTuner.")
        values["split_on"] = None
    section.note("caption_shuffle", "the variants have other orders of tags than SimpleTuner's.")
    shuffle.explain({})
    return {f"caption_shuffle_{key}": value for key, value in values.items() if value is not None}


def _filters(backends: Backends, section: Section) -> dict[str, Any]:
    """caption_filter_list of the text_embeds entry that the data set uses."""
    name = backends.text_embeds_of(section.take("text_embeds"))
    found = backends.entries[name].get("caption_filter_list") if name else None
    if not name or not found:
        return {}
    where = f"{shown(name)}.caption_filter_list"
    if isinstance(found, str) and found.lower().endswith((".txt", ".json")):
        section.note(
            "caption_filter_list",
            f"LEFT OUT. Copy the lines of {brief(found)}, which {where} names, into captions.caption_filter_list.",
        )
        return {}
    lines = [found] if isinstance(found, str) else found
    if not isinstance(lines, list) or not all(isinstance(line, str) for line in lines):
        raise ConfigError(f"{where} must be a list of texts or a file, got {brief(found)}.")
    lines = [line for line in lines if line.strip()]
    section.note(
        "caption_filter_list", f"from {where}. It changes the captions before prefixes and instance prompts are added."
    )
    odd = [line for line in lines if _SPECIAL.search(line.replace(".*", ""))]
    if odd:
        section.note(
            "caption_filter_list",
            f"taken as plain text, because only ^, $ and .* have a meaning: {', '.join(map(brief, odd[:3]))}.",
        )
    return {"caption_filter_list": lines} if lines else {}
