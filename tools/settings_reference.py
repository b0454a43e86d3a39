"""docs/settings.md, made from the settings' own definitions: `make docs` writes it, a test compares it.

python tools/settings_reference.py           (writes the file)
"""

from __future__ import annotations

import dataclasses
import json
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from trainer_core import config
from trainer_core.errors import ConfigError

FILE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"

# Section: class, key in the JSON file (empty: the file itself, None: not in it), nodes with these settings.
SECTIONS: tuple[tuple[type, str | None, str], ...] = (
    (config.JobConfig, "", "`run_dir` follows from `run_name` of **Train Qwen Edit LoRA**, `cache_dir` is fixed."),
    (config.ModelConfig, "model", "**Load Qwen Edit Model**; tokenizer and device are chosen by ComfyUI."),
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
    (config.LoraConfig, "lora", "**Qwen Edit LoRA Settings**."),
    (config.OptimizerConfig, "optimizer", "**Qwen Edit Optimizer Settings**."),
    (config.NoiseConfig, "noise", "**Qwen Edit Training Settings**."),
    (config.RolloutConfig, "rollout", "**Qwen Edit Rollout Settings**."),
    (config.EmaConfig, "ema", "**Qwen Edit EMA Settings**, where `use_ema` is on."),
    (config.BatchingConfig, "batching", "**Qwen Edit Training Settings**."),
    (config.CheckpointConfig, "checkpoints", "**Qwen Edit Training Settings**."),
    (config.ValidationConfig, "validation", "**Qwen Edit Validation Settings**."),
    (config.MemoryConfig, "memory", "**Qwen Edit Memory Settings**."),
    (config.ExportConfig, "export", "**Train Qwen Edit LoRA**, `trigger_words`; the file has the run's name."),
    (
        config.TrainConfig,
        None,
        "**Train Qwen Edit LoRA** makes it, as does `python -m trainer_core train` from the sections above. "
        "`config.json` in a run folder holds it.",
    ),
)
EXAMPLES: dict[str, Any] = {"target_dir": "target", "reference_dirs": ("reference",), "run_dir": "run"}
EXAMPLES |= {"encoded": "manifest.json", "cache_dir": "cache", "model": config.ModelConfig(), "id": "a"}
EXAMPLES |= {"dataset": config.DatasetConfig(target_dir="target", reference_dirs=("reference",))}
TYPES = {int: "whole number", float: "number", bool: "`true` or `false`", str: "text"}

HEAD = """# Settings

Every setting, its type or allowed values, its default, and what it does. This page is made by `make docs` from
`trainer_core/config`; nodes take their widgets, defaults and tooltips from there as well, so all three agree. Some
widgets have narrower limits.

The sections with a key are the JSON file of `python -m trainer_core`: an object with the settings of *The whole file*,
where a section's settings stand in an object under its key. An unknown key is refused, and the nearest known one named.
[guide.md](guide.md#without-comfyui) has an example of such a file.
"""


def reference() -> str:
    """The whole page."""
    return "\n".join([HEAD, *(line for section in SECTIONS for line in _section(*section))]).rstrip() + "\n"


def _section(cls: type, key: str | None, nodes: str) -> Iterator[str]:
    places = {None: "Not in the JSON file.", "": "In the JSON file at the top."}
    place = places.get(key, f"In the JSON file under `{key}`.")
    yield f"## {_title(cls)}\n\n{(cls.__doc__ or '').strip()}\n\n{place} In ComfyUI: {nodes}\n"
    yield "| name | allowed | default | meaning |\n| --- | --- | --- | --- |"
    for field in dataclasses.fields(cls):
        cells = (f"`{field.name}`", _allowed(cls, field), _default(field), field.metadata["help"])
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _title(cls: type) -> str:
    return "The whole file" if cls is config.JobConfig else cls.__name__.removesuffix("Config")


def _default(field: Any) -> str:
    if field.default is dataclasses.MISSING:
        return "must be given"
    if field.metadata.get("unless"):
        return f"must be given, or `{field.metadata['unless']}`"
    return "that section's" if dataclasses.is_dataclass(field.default) else f"`{json.dumps(field.default)}`"


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
        return _list(cls, field, typing.get_args(hint)[0])
    wrong = {int: (-(10**9), 10**9), float: (-1e9, 1e9), str: ("", "a/b"), bool: ()}[hint]
    limits = next((found for found in (_limits(cls, field.name, value) for value in wrong) if found), "")
    return TYPES[hint] + (f": {limits}" if limits else "")


def _list(cls: type, field: Any, of: Any) -> str:
    if dataclasses.is_dataclass(of):
        title = _title(typing.cast(type, of))
        return f"list of objects, see [{title}](#{title.lower()})"
    if typing.get_origin(of) is typing.Literal:
        return f"list of {', '.join(f'`{choice}`' for choice in typing.get_args(of))}; one may stand without the list"
    limits = _limits(cls, field.name, ())
    return f"list of {TYPES[of]}" + (f": {limits}" if limits else "")


def _limits(cls: type, name: str, wrong: object) -> str:
    """What the class itself says is allowed when it is given a wrong value; empty if it takes the value."""
    required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING or f.metadata["unless"]]
    try:
        cls(**{**{key: EXAMPLES[key] for key in required}, name: wrong})
    except ConfigError as error:
        return str(error).split("; allowed is ", 1)[1].rstrip(".")
    return ""


def main() -> int:
    """Write the page."""
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(reference(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
