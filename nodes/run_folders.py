"""Folders of runs by name. Names come from requests and graphs, and a run folder may come from someone else."""

from __future__ import annotations

from pathlib import Path

from ..trainer_core.errors import RunFolderError
from ..trainer_core.pictures.sample_pictures import INDEX
from ..trainer_core.runs import view
from ..trainer_core.text import brief
from . import host_folders
from .untrusted import checked_run_name, strays

_MOST = 500
FILES = ("run.json", "config.json", "metrics.jsonl", "graph.json", "samples", "base_pictures")  # that are read


def run_folder(name: str) -> Path:
    """Folder of the run with this name.

    Raises:
        ConfigError: the name is not allowed.
        RunFolderError: there is no such run, or its folder or a file in it leads elsewhere.
    """
    runs = host_folders.runs_dir()
    if strays(runs, [checked_run_name(name)]):
        raise RunFolderError("This run's folder is a link that leads out of the folder of runs, so it is not shown.")
    folder = runs / name
    if not (folder / "run.json").is_file():
        raise RunFolderError(f"There is no run {brief(name)}. It may have another name, or its folder was deleted.")
    inside = (path for pattern in (f"*/{INDEX}", "*/*.safetensors") for path in folder.glob(f"samples/{pattern}"))
    files = (path.relative_to(folder).as_posix() for path in (*inside, *folder.glob("*.safetensors")))
    if stray := strays(folder, (*FILES, *files)):
        raise RunFolderError(f"{stray} of this run is not a file or leads out of its folder, so the run is not shown.")
    return folder


def all_runs() -> list[Path]:
    """Folders of all runs, those whose state changed last first, without those that lead elsewhere."""
    runs = host_folders.runs_dir()
    folders = [folder for folder in view.run_folders(runs, _MOST) if not strays(runs, [folder.name])]
    return [folder for folder in folders if not strays(folder, FILES)]


def runs_with_lora() -> list[str]:
    """Names of the runs that have exported a LoRA or kept one of a step, the newest first.

    `run_folder` may still refuse one.
    """
    return [folder.name for folder in view.run_folders(host_folders.runs_dir(), _MOST) if view.has_lora(folder)]
