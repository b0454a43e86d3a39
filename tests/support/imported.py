"""The edit-v1 example of SimpleTuner's quickstart, imported with changes, and lines of the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support.quickstart import CONFIG, EDIT_V1
from trainer_core.json_text import plain_json
from trainer_core.simpletuner.convert import Imported, convert

ROOT = Path("/somewhere")


def read(changes: dict[str, Any] | None = None, datasets: list | None = None, **first: Any) -> Imported:
    """Converts the edit-v1 example, with `changes` in the configuration and `first` in the first data set."""
    settings = {**json.loads(plain_json(CONFIG)), **(changes or {})}
    datasets = datasets if datasets is not None else json.loads(plain_json(EDIT_V1))
    datasets[0] = {**datasets[0], **first}
    return convert(settings, datasets, root=ROOT)


def line(imported: Imported, start: str) -> str:
    """The line of the report that starts so, or that says this about the key together with others."""
    key, _, text = start.partition(":")
    heads = [each.partition(":") for each in imported.report]
    together = [key in head.split(", ") and rest.startswith(text) for head, _, rest in heads]
    lines = zip(imported.report, together, strict=True)
    found = [each for each, named in lines if each.startswith(start) or (":" in start and named)]
    assert len(found) == 1, imported.report
    return found[0]


def options() -> list[str]:
    """SimpleTuner 4.8's options, their other spellings, and the old ones that it still takes."""
    return (Path(__file__).parents[1] / "golden" / "simpletuner_options.txt").read_text(encoding="utf-8").split()


def mentioned(imported: Imported) -> set[str]:
    """The options that the report has a line on, or that it lists as converted."""
    listed = line(imported, "config.json: converted: ").removeprefix("config.json: converted: ").rstrip(".").split(", ")
    return {*listed, *(key for each in imported.report for key in each.split(":")[0].split(", "))}
