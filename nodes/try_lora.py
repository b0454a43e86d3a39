"""The node that shows what a run's LoRA does, with the run's own model and pairs."""

from __future__ import annotations

import math
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.errors import ConfigError, TrainerError
from . import host_call, host_folders, sockets
from .run_folders import run_folder, runs_with_lora
from .schema import CATEGORY, Node, new_input, new_output, node_schema
from .untrusted import checked_run_name, file_below_roots

if TYPE_CHECKING:
    from PIL import Image

    from ..trainer_core.try_lora import Tried

HELD_OUT = "held-out pair"
_STRENGTH = 10.0
_MOST = 1_000_000


class TryLora(Node):
    """Draw a held-out pair or a picture with the LoRA of a run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "TryLora",
            "Try Qwen Edit LoRA",
            category=CATEGORY,
            description="Shows what the LoRA of a run does: on a held-out pair, exactly as the run's validation draws "
            "it, or on a picture of yours. The model and the pairs are those of the run.",
            search_aliases=["test lora", "sample", "preview", "lora strength"],
            is_output_node=True,
            inputs=_inputs(),
            outputs=[
                new_output(io.Image, "image", "The pictures side by side: reference, base model, LoRA and target.")
            ],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None, picture: str | None = None) -> bool | str:
        """Check the names. The run may be newer than the list that the page has."""
        if run_name not in (None, host_folders.NO_FILE):
            checked_run_name(run_name)
        return picture in (None, HELD_OUT) or bool(_picture_file(picture))

    @classmethod
    def fingerprint_inputs(cls, run_name: str | None = None, picture: str | None = None, **_widgets: Any) -> str:
        """A value that changes when the run or the picture does."""
        return (
            f"{_state(lambda: run_folder(run_name or '') / 'run.json')} {_state(lambda: _picture_file(picture or ''))}"
        )

    @classmethod
    def execute(
        cls,
        run_name: str,
        step: int,
        strength: float,
        pair: int,
        picture: str,
        instruction: str,
        run: sockets.FinishedRun | None = None,
    ) -> io.NodeOutput:
        """Outputs the pictures side by side as IMAGE."""
        from ..trainer_core.try_lora import Trial, tried_run, try_lora
        from .pictures import file_to_image

        name = run.run_dir.name if run else run_name
        if name == host_folders.NO_FILE:
            raise ConfigError("There is no run with a LoRA yet. Train one first, or connect a run.")
        found = tried_run(run_folder(name), host_folders.cache_dir())
        few_step = host_folders.lora_here(found.config.validation.validation_lora, name)
        found = found.with_few_step_lora(few_step)
        trial = Trial(
            run=found,
            model=host_folders.model_here(found.config.model, name),
            step=step,
            strength=strength,
            pair=pair,
            picture=None if picture == HELD_OUT else _open(picture),
            instruction=instruction.strip(),
        )
        folder = host_folders.temp_dir() / "qwen_edit_trainer" / f"try-{uuid.uuid4().hex}"
        with host_call.long_call() as observer:
            tried = try_lora(trial, folder, observer)
        return io.NodeOutput(file_to_image(tried.grid_file), ui=_shown(name, strength, tried))


def _inputs() -> list[io.Input]:
    runs, pictures = runs_with_lora() or [host_folders.NO_FILE], [HELD_OUT, *host_folders.input_pictures()]
    name = new_input(
        io.Combo, "run_name", options=runs, tooltip="A run that has a LoRA. Ignored if a run is connected."
    )
    # For web/trainer/shown_widgets.js: after the first training, the page would draw the outdated "none found" in red.
    name.extra_dict = {"qwen_edit_used": {"if": [], "unused": None, "ignored_with": "run"}}
    return [
        name,
        new_input(
            io.Int,
            "step",
            default=0,
            min=0,
            max=_MOST,
            tooltip="A validated step whose LoRA is kept. 0: the end of the run.",
        ),
        new_input(
            io.Float,
            "strength",
            default=1.0,
            min=-_STRENGTH,
            max=_STRENGTH,
            step=0.05,
            tooltip="Strength of the LoRA. 1 is as trained, 0 is off; 0.7 to 1.2 is common.",
        ),
        new_input(
            io.Int, "pair", default=1, min=1, max=_MOST, tooltip="Number of the held-out pair, as in the validation."
        ),
        new_input(
            io.Combo,
            "picture",
            options=pictures,
            default=HELD_OUT,
            tooltip="A picture in ComfyUI's input folder to edit instead of the pair's.",
        ),
        new_input(
            io.String,
            "instruction",
            multiline=True,
            default="",
            tooltip="Edit instruction. Empty: that of the pair.",
        ),
        new_input(
            sockets.Run, "run", optional=True, tooltip="The run, from a training node. Used instead of run_name."
        ),
    ]


def _state(find: Callable[[], Path]) -> int:
    """When a file changed, in ns; 0 if it can't be found."""
    try:
        return find().stat().st_mtime_ns
    except (TrainerError, OSError):
        return 0


def _picture_file(name: str) -> Path:
    return file_below_roots(name, {"input": host_folders.input_dir()}, "picture")


def _open(name: str) -> Image.Image:
    from ..trainer_core.data.images import open_picture

    return open_picture(_picture_file(name))


def _shown(name: str, strength: float, tried: Tried) -> dict[str, list[Any]]:
    """The node's UI output: the grid, a line of text, and the single pictures for the page's panel."""
    from ..trainer_core.pictures.sample_pictures import read_sample_index

    (row,) = read_sample_index(tried.folder)
    pictures = {column: _temporary(tried.folder / file) for column, file in row["pictures"].items()}
    report = tried.report
    psnr = {each: _finite(getattr(report, f"psnr_{each}")) if report else None for each in ("base", "lora", "ema")}
    measured = report.as_text() if report else ""
    figures = {
        "run_name": name,
        "step": tried.step,
        "strength": strength,
        "caption": row["caption"],
        "pictures": pictures,
        "psnr": psnr,
    }
    return {
        "images": [_temporary(tried.grid_file)],
        "text": [f"{name}, step {tried.step}, strength {strength:g}" + (f"\n{measured}" if measured else "")],
        "qwen_edit_try": [figures],
    }


def _finite(value: float | None) -> float | None:
    return round(value, 3) if value is not None and math.isfinite(value) else None


def _temporary(path: Path) -> dict[str, str]:
    """Reference to a file in ComfyUI's temporary folder, as its page expects it."""
    subfolder = path.parent.relative_to(host_folders.temp_dir()).as_posix()
    return {"filename": path.name, "subfolder": subfolder, "type": "temp"}
