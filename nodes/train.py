"""The training node: builds a TrainConfig, trains, and publishes the result."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from comfy_api.latest import io

from ..trainer_core.config import ExportConfig, ModelConfig, TrainConfig
from ..trainer_core.errors import Interrupted, Problems, SettingsError
from . import graph_file, host_call, host_folders, host_lora, host_server, publish, sockets
from .refused import refusal_of
from .schema import Node, new_input, new_output, node_schema, setting_input
from .train_config import imported_input, preset_input, settings_input, train_config, validation_input
from .untrusted import checked_run_name, free_name

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset
    from ..trainer_core.run import TrainResult

IfRunExists = Literal["continue", "continue a kept run", "new run"]


class TrainLora(Node):
    """Train a LoRA, or return the result if the run is already finished."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "TrainLora",
            "Train Qwen Edit LoRA (advanced)",
            description="Trains a LoRA on encoded pairs and saves it where LoRA loaders list it. Interrupting keeps "
            "the progress; queue the same graph again to resume.",
            search_aliases=["finetune", "lora training", "trainer"],
            is_output_node=True,
            not_idempotent=True,
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            inputs=_inputs(),
            outputs=[
                new_output(
                    io.LoraModel, "lora", "The LoRA's tensors, for ComfyUI's Load LoRA Model in the same graph."
                ),
                new_output(io.LossMap, "loss_map", "Loss of every step, for Plot Loss or ComfyUI's loss graph."),
                new_output(io.String, "lora_name", "Name of the new file in ComfyUI's LoRA loaders."),
                new_output(
                    io.Image,
                    "grid",
                    "Reference, base, LoRA and target pictures of validation pairs at the end of training.",
                ),
                new_output(
                    sockets.Run,
                    "run",
                    "The finished run, for Apply Trained LoRA, Sample With Qwen Edit LoRA and Plot Loss.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        """Check the run name, and the settings in connected nodes as far as they are known."""
        refusal = refusal_of(cls.hidden)
        if refusal is True and run_name is not None:
            checked_run_name(run_name)
        return refusal

    @classmethod
    def execute(cls, model: ModelConfig, encoded: EncodedDataset, **values: Any) -> io.NodeOutput:
        """Outputs the LoRA's tensors, losses, name, sample grid and run."""
        config = run_config(model, encoded, **values)
        continue_kept = values["if_run_exists"] == "continue a kept run"
        result = _finished(config, continue_kept=continue_kept)
        if result is not None:
            return _output(result, is_new=False)

        def keep_graph() -> None:
            hidden = cls.hidden
            graph_file.keep_graph(Path(config.run_dir), hidden.unique_id, hidden.prompt, hidden.extra_pnginfo)

        return _output(_train(config, keep_graph, continue_kept=continue_kept), is_new=True)


def _inputs() -> list[io.Input]:
    return [
        new_input(sockets.Model, "model", tooltip="The base model, from Load Qwen Edit Model."),
        new_input(sockets.Encoded, "encoded", tooltip="The pairs to learn, from Encode Edit Pairs."),
        new_input(
            io.String,
            "run_name",
            default="my_edit",
            tooltip="Name of the run folder and of the LoRA file. A name, not a path.",
        ),
        setting_input(TrainConfig, "max_train_steps", tooltip=_STEPS_HELP),
        setting_input(TrainConfig, "seed", control_after_generate=False),
        new_input(
            io.Combo,
            "if_run_exists",
            options=list(get_args(IfRunExists)),
            default="continue",
            tooltip="What to do if a run with this name exists. continue: resume it, or return its result if it is "
            "finished. continue a kept run: also resume a run that was ended with stop-and-keep. new run: train under "
            "a new name with a number.",
        ),
        *(settings_input(f"{name}_settings") for name in ("lora", "optimizer", "training", "validation")),
        setting_input(ExportConfig, "trigger_words", optional=True),
        validation_input(),
        imported_input(),
        settings_input("rollout_settings"),
        preset_input(),
        settings_input("memory_settings"),
        settings_input("ema_settings"),
        setting_input(ExportConfig, "layer_prefix", optional=True, advanced=True),
    ]


_STEPS_HELP = (
    "Number of optimizer steps. 500 to 3000 for a few dozen pairs; more if the base model is far from the edit."
)


def run_config(
    model: ModelConfig,
    encoded: EncodedDataset | None,
    *,
    run_name: str,
    max_train_steps: int,
    seed: int,
    if_run_exists: IfRunExists,
    trigger_words: str = "",
    **gathered: Any,
) -> TrainConfig:
    """The configuration of a run from the node's inputs. `encoded`: None while it is not known.

    Raises:
        ConfigError: the run name is not allowed, or the settings contradict each other; lists all.
    """
    problems, folder = Problems(), host_folders.runs_dir()
    name = problems.attempt(lambda: checked_run_name(run_name)) or "-"
    if if_run_exists == "new run":
        name = free_name(folder, name)
    own = {"run_dir": str(folder / name), "max_train_steps": max_train_steps, "seed": seed}
    build = partial(train_config, model, encoded, own, lora_name=name, trigger_words=trigger_words, **gathered)
    config = problems.attempt(build)
    problems.raise_all(SettingsError)
    assert config is not None
    return config


def _finished(config: TrainConfig, *, continue_kept: bool) -> TrainResult | None:
    """The result of a finished run with these settings, or None. Needs no device memory."""
    from ..trainer_core.run import find_result

    return find_result(config, continue_kept=continue_kept)


def _train(config: TrainConfig, on_first_step: Callable[[], None], *, continue_kept: bool) -> TrainResult:
    from ..trainer_core.run import train_lora

    with host_call.long_call(Path(config.run_dir).name, on_first_step) as observer:
        result = train_lora(config, observer, extra_check=host_lora.check_lora_file, continue_kept=continue_kept)
        if result.lora_file is None:
            raise Interrupted(
                "Training was interrupted and its progress is saved. Queue the same graph again to resume."
            )
        return result


def _output(result: TrainResult, *, is_new: bool) -> io.NodeOutput:
    from ..trainer_core.files import read_tensors
    from ..trainer_core.runs.folder import RunFolder
    from .pictures import empty_image, file_to_image

    assert result.lora_file is not None
    lora_name = publish.place_lora(result.lora_file, result.run_dir.name)
    ema_name = publish.place_lora(result.ema_file, result.run_dir.name) if result.ema_file else None
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
        ui=publish.run_ui(result, lora_name, ema_name, seconds=seconds),
    )
