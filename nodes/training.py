"""Shared by the two training nodes: their schema, the check before a run, and the training itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from comfy_api.latest import io

from ..trainer_core.config import TrainConfig
from ..trainer_core.errors import Interrupted
from . import graph_file, host_lora, host_server, publish, run_names, sockets
from .run_names import IfRunExists
from .schema import new_input, new_output, node_schema

if TYPE_CHECKING:
    from ..trainer_core.events import Observer
    from ..trainer_core.run import TrainResult

ADVANCED, SHORT = "QwenEdit_TrainLora", "QwenEdit_Train"
TRAININGS = (ADVANCED, SHORT)
"""The types of the training nodes: with encoded pairs and all settings, and of the short path."""


def training_schema(name: str, display_name: str, inputs: list[io.Input], **keywords: Any) -> io.Schema:
    """The schema of a training node."""
    return node_schema(
        name,
        display_name,
        is_output_node=True,
        not_idempotent=True,
        hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],  # to save the graph
        inputs=inputs,
        outputs=_outputs(),
        **keywords,
    )


def run_exists_input(default: IfRunExists, **keywords: Any) -> io.Input:
    """The widget that says what to do if a run has the name already."""
    choices = list(get_args(IfRunExists))
    return new_input(io.Combo, "if_run_exists", options=choices, default=default, tooltip=run_names.HELP, **keywords)


def _outputs() -> list[io.Output]:
    return [
        new_output(io.LoraModel, "lora", "The LoRA's tensors, for ComfyUI's Load LoRA Model in the same graph."),
        new_output(io.LossMap, "loss_map", "Loss of every step, for Plot Loss or ComfyUI's loss graph."),
        new_output(io.String, "lora_name", "Name of the new file in ComfyUI's LoRA loaders."),
        new_output(
            io.Image, "grid", "Reference, base, LoRA and target pictures of validation pairs at the end of training."
        ),
        new_output(
            sockets.Run, "run", "The finished run, for Apply Trained LoRA, Sample With Qwen Edit LoRA and Plot Loss."
        ),
    ]


def graph_keeper(config: TrainConfig, hidden: Any) -> Callable[[], None]:
    """A function that saves the graph with these hidden inputs in the run folder."""
    run_dir = Path(config.run_dir)
    return lambda: graph_file.keep_graph(run_dir, hidden.unique_id, hidden.prompt, hidden.extra_pnginfo)


def finished(config: TrainConfig, *, continue_kept: bool = False) -> TrainResult | None:
    """The result of a finished run with these settings, or None. Needs no device memory."""
    from ..trainer_core.run import find_result

    return find_result(config, continue_kept=continue_kept)


def train(config: TrainConfig, observer: Observer, *, continue_kept: bool = False) -> TrainResult:
    """Train, inside a `host_call.long_call`.

    Raises:
        Interrupted: the user paused the run.
    """
    from ..trainer_core.run import train_lora

    result = train_lora(config, observer, extra_check=host_lora.check_lora_file, continue_kept=continue_kept)
    if result.lora_file is None:
        raise Interrupted("Training was interrupted and its progress is saved. Queue the same graph again to resume.")
    return result


def output(result: TrainResult, *, is_new: bool, notes: Sequence[str] = ()) -> io.NodeOutput:
    """What a training node outputs. `notes` are shown below the figures of the run."""
    from ..trainer_core.files import read_tensors
    from ..trainer_core.runs.folder import RunFolder
    from .pictures import empty_image, file_to_image

    assert result.lora_file is not None
    lora_name = publish.place_lora(result.lora_file, result.run_dir.name)
    ema_name = publish.place_lora(result.ema_file, result.run_dir.name) if result.ema_file else None
    best_name = publish.place_lora(result.best_file, result.run_dir.name) if result.best_file else None
    if is_new:
        host_server.send_message("qwen_edit_trainer.lora", {"run_name": result.run_dir.name, "lora_name": lora_name})
    rows = RunFolder(result.run_dir).metrics()
    grid = file_to_image(result.samples.grid_file) if result.samples else empty_image()
    run = sockets.FinishedRun(run_dir=result.run_dir, lora_file=result.lora_file, steps=result.steps_done)
    seconds = sum(row.get("seconds") or 0.0 for row in rows)
    return io.NodeOutput(
        read_tensors(result.lora_file),
        {"loss": [float(row["loss"]) for row in rows]},
        lora_name,
        grid,
        run,
        ui=publish.run_ui(result, lora_name, ema_name, best_name, seconds=seconds, notes=notes),
    )
