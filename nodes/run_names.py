"""Which run folder a training uses: the run of that name, or a new one with a number."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..trainer_core.config import TrainConfig
from ..trainer_core.text import brief, some_of
from . import host_folders
from .untrusted import checked_run_name, free_name

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset

IfRunExists = Literal["continue", "continue a kept run", "new run", "continue, or a new name if the settings differ"]
KEPT_TOO: IfRunExists = "continue a kept run"
OR_NEW_NAME: IfRunExists = "continue, or a new name if the settings differ"
HELP = (
    "What to do if a run with this name exists. continue: resume it, or return its result if it is finished. continue "
    "a kept run: also resume a run that was ended with stop-and-keep. new run: train under a new name with a number. "
    "continue, or a new name if the settings differ: continue the newest run of this name that has the same settings "
    "and pairs; if there is none, train under a new name with a number."
)


def continues_kept(if_run_exists: str) -> bool:
    """Whether this choice also goes on with a run that was ended with stop-and-keep."""
    return if_run_exists == KEPT_TOO


def first_name(run_name: str, if_run_exists: str, label: str = "run_name") -> str:
    """The name of the run as far as its pairs do not matter. `label` is what the page calls it.

    Raises:
        ConfigError: the run name is not allowed.
    """
    name = checked_run_name(run_name, label)
    return free_name(host_folders.runs_dir(), name) if if_run_exists == "new run" else name


def settled(config: TrainConfig, encoded: EncodedDataset | None, if_run_exists: str) -> tuple[TrainConfig, str]:
    """The configuration for the run that is continued or started with these pairs, which may not be encoded yet.

    Also returns a sentence if an existing run can't be continued; empty otherwise. Without pairs, as for a new run.
    """
    if if_run_exists != OR_NEW_NAME:
        return config, ""
    from ..trainer_core.runs.result import can_go_on

    folder, name = Path(config.run_dir).parent, Path(config.run_dir).name
    if encoded is None:
        return _named(config, folder, free_name(folder, name)), ""
    config = replace(config, encoded=str(encoded.manifest))
    existing = _existing(folder, name)
    for each in existing:
        named = _named(config, folder, each)
        if can_go_on(named, encoded):
            return named, ""
    new = free_name(folder, name)
    if not existing:
        return _named(config, folder, new), ""
    was, it = ("was", "it") if len(existing) == 1 else ("were", "they")
    note = (
        f"{some_of([brief(each) for each in existing])} {was} started with other settings or pairs, so {it} can't be "
        f"continued. The new run has the name {brief(new)}. Nothing is overwritten."
    )
    return _named(config, folder, new), note


def _existing(folder: Path, name: str) -> list[str]:
    """Names of the folders that this name has led to, the highest number first."""
    numbered = re.compile(rf"{re.escape(name)}-([2-9]|[1-9][0-9]{{1,3}})")
    found = {int(match[1]): path.name for path in folder.glob("*") if (match := numbered.fullmatch(path.name))}
    names = [found[number] for number in sorted(found, reverse=True)]
    return [*names, name] if (folder / name).exists() else names


def _named(config: TrainConfig, folder: Path, name: str) -> TrainConfig:
    return replace(config, run_dir=str(folder / name), export=replace(config.export, lora_name=name))
