"""The quickstart's examples: presets that are complete jobs on the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageOps

from .config import JobConfig, from_json
from .demo.pictures import copy_demo_pairs
from .errors import ConfigError
from .job import resolve_job
from .presets import preset_names, read_preset
from .settings import changed, merged

_TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")
_FURTHER_REFERENCES = {"reference_2": ImageOps.grayscale, "reference_3": ImageOps.mirror}


def example_job(name: str, folder: Path, changes: Sequence[str] = ()) -> JobConfig:
    """The job of an example. Copies its pairs to `folder`/example if that doesn't exist.

    Raises:
        ConfigError: there is no such example, or no tokenizer was found.
    """
    preset = read_preset(name)
    if "demo" not in preset:
        whole = ", ".join(each for each in preset_names() if "demo" in read_preset(each))
        raise ConfigError(
            f"The preset {name!r} needs a configuration with your folders. Presets that work without one: {whole}."
        )
    values = changed(merged(preset["job"], preset["demo"]), changes)
    values["model"].setdefault("tokenizer", "")
    if not values["model"]["tokenizer"]:
        values["model"]["tokenizer"] = str(_find_tokenizer(folder))
    job = resolve_job(from_json(JobConfig, values), folder)
    if not (folder / "example").exists():
        _make_pairs(folder / "example")
    return job


def _make_pairs(folder: Path) -> None:
    """Copy the demo's pairs, and make two more references each, for flavours that take three."""
    copy_demo_pairs(folder)
    for path in sorted((folder / "reference").glob("*.png")):
        with Image.open(path) as picture:
            for name, change in _FURTHER_REFERENCES.items():
                (folder / name).mkdir(exist_ok=True)
                change(picture).convert("RGB").save(folder / name / path.name)


def _find_tokenizer(folder: Path) -> Path:
    """The tokenizer of a ComfyUI in or beside a folder that contains this extension or `folder`."""
    here = Path(__file__).resolve()
    for place in (*here.parents, folder.resolve(), *folder.resolve().parents):
        for tree in (place, place / ".comfyui" / "ComfyUI", place / "ComfyUI"):
            if (tree / _TOKENIZER).is_dir():
                return tree / _TOKENIZER
    raise ConfigError(
        "The demo model has no tokenizer, and no ComfyUI was found near this folder. Set the folder "
        f"{_TOKENIZER.as_posix()} of a ComfyUI with --set model.tokenizer=FOLDER."
    )
