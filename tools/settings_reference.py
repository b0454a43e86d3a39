"""Writes docs/settings.md and docs/job.schema.json from the declarations of the settings (`make docs`).

A test checks that both files are current.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer_core import config
from trainer_core.settings import If, Limits
from trainer_core.text import LONGEST_LIST, LONGEST_PROMPT, LONGEST_TEXT

DOCS = Path(__file__).resolve().parents[1] / "docs"
FILE, SCHEMA = DOCS / "settings.md", DOCS / "job.schema.json"

# Per section: class, key in the JSON file (empty: top level; None: not in the file), nodes with these settings.
SECTIONS: tuple[tuple[type, str | None, str], ...] = (
    (
        config.JobConfig,
        "",
        "`run_dir` is named after `run_name` of **Train Qwen Edit LoRA (advanced)**, `cache_dir` is fixed.",
    ),
    (config.ModelConfig, "model", "**Load Qwen Edit Model**; ComfyUI chooses the tokenizer and the device."),
    (config.FrozenLoraConfig, "model.frozen_loras[]", "**Add LoRA To Qwen Edit Model**."),
    (config.DatasetConfig, "dataset", "**Pair Edit Folders**, as `target_folder` and `reference_folder_1` to `_3`."),
    (config.CaptionConfig, "dataset.captions", "**Qwen Edit Caption Settings**."),
    (config.EncodingConfig, "encoding", "**Encode Edit Pairs** and **Qwen Edit Reference Settings**."),
    (config.SizeConfig, "encoding.sizes", "**Qwen Edit Size Settings**."),
    (
        config.DatasetPartConfig,
        "datasets[]",
        "**Pair Edit Folders** and **Encode Edit Pairs** for each, and **Mix Encoded Pairs**.",
    ),
    (config.PairCheckConfig, "pair_check", "**Check Edit Pairs**."),
    (config.CaptionDraftConfig, "caption_drafts", "**Draft Edit Captions**."),
    (config.LoraConfig, "lora", "**Qwen Edit LoRA Settings**."),
    (config.OptimizerConfig, "optimizer", "**Qwen Edit Optimizer Settings**."),
    (config.NoiseConfig, "noise", "**Qwen Edit Training Settings**."),
    (config.RolloutConfig, "rollout", "**Qwen Edit Rollout Settings**."),
    (
        config.PreservationConfig,
        "preservation",
        "**Qwen Edit Preservation Settings**, which also sets `preservation_prompts` of the encoding.",
    ),
    (config.EmaConfig, "ema", "**Qwen Edit EMA Settings**, which turns `use_ema` on."),
    (config.BatchingConfig, "batching", "**Qwen Edit Training Settings**."),
    (config.CheckpointConfig, "checkpoints", "**Qwen Edit Training Settings**."),
    (config.ValidationConfig, "validation", "**Qwen Edit Validation Settings**."),
    (config.MemoryConfig, "memory", "**Qwen Edit Memory Settings**."),
    (
        config.ExportConfig,
        "export",
        "**Train Qwen Edit LoRA (advanced)** has `trigger_words`; the file is named after the run.",
    ),
    (
        config.TrainConfig,
        None,
        "**Train Qwen Edit LoRA (advanced)** and `python -m trainer_core train` make it from the sections above and "
        "store it as `config.json` in the run folder.",
    ),
)
TYPES = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}

HEAD = f"""# Settings

All settings with their type or allowed values, default and meaning. `make docs` writes this page from
`trainer_core/config`. The nodes take widgets, defaults, limits and tooltips from the same declarations. Some widgets
offer a narrower range. Nodes hide a widget that is not used under the other values; runs ignore its value.

Sections with a key are part of the JSON file of `python -m trainer_core`. The file is an object with the settings of
*The whole file*; the settings of a section are in an object under its key. A list of texts may be given as one text.
A text has at most {LONGEST_TEXT:,} characters, a prompt or a part of a caption {LONGEST_PROMPT:,}. A list has at most
{LONGEST_LIST:,} items. An unknown key is an error, which suggests the most similar known key.
[headless.md](headless.md#the-configuration-file) has an example of such a file. [job.schema.json](job.schema.json) is
its JSON schema: with the path to it under `$schema`, editors complete and check the file.
"""


def reference() -> str:
    """The text of docs/settings.md."""
    return "\n".join([HEAD, *(line for section in SECTIONS for line in _section(*section))]).rstrip() + "\n"


def _section(cls: type, key: str | None, nodes: str) -> Iterator[str]:
    places = {None: "Not in the JSON file.", "": "At the top level of the JSON file."}
    place = places.get(key, f"In the JSON file under `{key}`.")
    where = textwrap.fill(f"{place} In ComfyUI: {nodes}", 120, break_long_words=False, break_on_hyphens=False)
    yield f"## {_title(cls)}\n\n{(cls.__doc__ or '').strip()}\n\n{where}\n"
    yield "| name | allowed | default | meaning |\n| --- | --- | --- | --- |"
    for field in dataclasses.fields(cls):
        meaning = f"{field.metadata['help']} {used_in_words(field.metadata['used_if'], _json)}".rstrip()
        cells = (f"`{field.name}`", _allowed(cls, field), _default(field), meaning)
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def used_in_words(conditions: Iterable[If], shown: Callable[[Any], str], name: Callable[[str], str] = str) -> str:
    """A sentence that says when a setting changes something; empty if always.

    Args:
        conditions: those that are declared for the setting.
        shown: makes Markdown of a value.
        name: the name that readers know of another setting.
    """
    found: list[str] = []
    for condition in conditions:
        equals, differs = ([shown(value) for value in values] for values in condition[1:])
        found += [f"`{name(condition.setting)}` is {_or(equals)}"] if equals else []
        found += [f"`{name(condition.setting)}` is not {_or(differs)}"] if differs else []
    return f"Used if {' and '.join(found)}." if found else ""


def _or(values: list[str]) -> str:
    return " or ".join(filter(None, (", ".join(values[:-1]), values[-1])))


def _json(value: Any) -> str:
    return f"`{json.dumps(value)}`"


def _title(cls: type) -> str:
    return "The whole file" if cls is config.JobConfig else cls.__name__.removesuffix("Config")


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "must be given"
    if field.metadata.get("unless"):
        return f"must be given, or `{field.metadata['unless']}`"
    return "the defaults of that section" if dataclasses.is_dataclass(field.default) else _json(field.default)


def _allowed(cls: type, field: Any) -> str:
    hint = typing.get_type_hints(cls)[field.name]
    if typing.get_origin(hint) is types.UnionType:
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        title = _title(typing.cast(type, hint))
        return f"object, see [{title}](#{title.lower()})"
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return _list(field, typing.get_args(hint)[0])
    return _described(TYPES[hint], field)


def _list(field: Any, of: Any) -> str:
    if dataclasses.is_dataclass(of):
        title = _title(typing.cast(type, of))
        return f"list of objects, see [{title}](#{title.lower()})"
    if typing.get_origin(of) is typing.Literal:
        return f"list of {', '.join(f'`{choice}`' for choice in typing.get_args(of))}"
    return _described(f"list of {TYPES[of]}", field)


def _described(kind: str, field: Any) -> str:
    limits = str(field.metadata["limits"])
    return f"{kind}: {limits}" if limits else kind


def job_schema() -> dict[str, Any]:
    """The JSON schema of a job file."""
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Qwen Edit Trainer job"}
    schema = _object_schema(config.JobConfig)
    schema["properties"]["$schema"] = {"type": "string"}
    return {**head, **schema}


def _object_schema(cls: type) -> dict[str, Any]:
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)
    required = [f.name for f in fields if f.default is dataclasses.MISSING and not f.metadata["unless"]]
    properties = {
        field.name: {**_value_schema(hints[field.name], field), "description": field.metadata["help"]}
        for field in fields
    }
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _value_schema(hint: Any, field: Any) -> dict[str, Any]:
    if typing.get_origin(hint) is types.UnionType:
        hint = typing.get_args(hint)[0]
    if dataclasses.is_dataclass(hint):
        return _object_schema(typing.cast(type, hint))
    if typing.get_origin(hint) is typing.Literal:
        older = [True, False] if field and field.name == "compile_blocks" else []  # its values in older files
        return {"enum": [*typing.get_args(hint), *older]}
    if typing.get_origin(hint) is tuple:
        item = _value_schema(typing.get_args(hint)[0], None)
        if field and item.get("type") == "string":
            item["maxLength"] = field.metadata["limits"].longest
        array = {"type": "array", "items": item, "maxItems": LONGEST_LIST}
        return array if item.get("type") == "object" else {"anyOf": [array, item]}
    if field and field.name == "validation_resolution":  # the side of a square may be a number
        return {"type": ["string", "integer"]}
    kind = {int: "integer", float: "number", bool: "boolean", str: "string"}[hint]
    return _bounded(kind, field.metadata["limits"]) if field else {"type": kind}


def _bounded(kind: str, limits: Limits) -> dict[str, Any]:
    """Schema of a number or text with its limits. The trainer also makes checks that a schema can't express."""
    bounds = {
        "minimum": limits.min,
        "maximum": limits.max,
        "exclusiveMinimum": limits.above,
        "exclusiveMaximum": limits.below,
        "enum": list(limits.choices) or None,
        "maxLength": limits.longest if kind == "string" else None,
    }
    schema = {"type": kind, **{name: bound for name, bound in bounds.items() if bound is not None}}
    return schema if limits.also is None else {"anyOf": [{"const": limits.also}, schema]}


def schema_text() -> str:
    """The text of docs/job.schema.json."""
    return json.dumps(job_schema(), indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write both files."""
    FILE.write_text(reference(), encoding="utf-8")
    SCHEMA.write_text(schema_text(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
