"""The training node: builds a TrainConfig, trains, and publishes the result."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import ExportConfig, ModelConfig, TrainConfig
from ..trainer_core.errors import Problems, SettingsError
from . import host_call, host_folders, sockets, training
from .overrides import in_words
from .run_names import IfRunExists, continues_kept, first_name, settled
from .schema import Node, new_input, setting_input
from .train_config import (
    NO_PRESET,
    imported_input,
    preset_input,
    preset_overrides,
    settings_input,
    train_config,
    validation_input,
)
from .untrusted import checked_run_name

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset

TRAIN_NODE = "Train Qwen Edit LoRA (advanced)"


class TrainLora(Node):
    """Train a LoRA, or return the result if the run is already finished."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return training.training_schema(
            "TrainLora",
            TRAIN_NODE,
            _inputs(),
            description="Trains a LoRA on encoded pairs and saves it where LoRA loaders list it. Interrupting keeps "
            "the progress; queue the same graph again to resume.",
            search_aliases=["finetune", "lora training", "trainer"],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        """Check the run name. A linked one arrives as None."""
        return run_name is None or bool(checked_run_name(run_name))

    @classmethod
    def execute(cls, model: ModelConfig, encoded: EncodedDataset, **values: Any) -> io.NodeOutput:
        """Outputs the LoRA's tensors, losses, name, sample grid and run."""
        choice, problems = values["if_run_exists"], Problems()
        config = run_config(problems, model, encoded, **values)
        problems.raise_all(SettingsError)
        assert config is not None
        config, note = settled(config, encoded, choice)
        continue_kept = continues_kept(choice)
        preset, imported = values.get("preset", NO_PRESET), values.get("imported") is not None
        overridden = preset_overrides(config, preset, encoded, TRAIN_NODE, is_imported=imported)
        notes = [text for text in (note, in_words(preset, overridden)) if text]
        result = training.finished(config, continue_kept=continue_kept)
        if result is not None:
            return training.output(result, is_new=False, notes=notes)
        keep_graph = training.graph_keeper(config, cls.hidden)
        with host_call.long_call(Path(config.run_dir).name, keep_graph) as observer:
            for text in notes:
                observer.on_note(text)
            result = training.train(config, observer, continue_kept=continue_kept)
        return training.output(result, is_new=True, notes=notes)


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
        training.run_exists_input("continue"),
        *(settings_input(f"{name}_settings") for name in ("lora", "optimizer", "training", "validation")),
        setting_input(ExportConfig, "trigger_words", optional=True),
        validation_input(),
        imported_input(),
        settings_input("rollout_settings"),
        preset_input(),
        settings_input("memory_settings"),
        settings_input("ema_settings"),
        setting_input(ExportConfig, "layer_prefix", optional=True, advanced=True),
        settings_input("preservation_settings"),
    ]


_STEPS_HELP = (
    "Number of optimizer steps. 500 to 3000 for a few dozen pairs; more if the base model is far from the edit."
)


def run_config(
    problems: Problems,
    model: ModelConfig,
    encoded: EncodedDataset | None,
    *,
    run_name: str,
    max_train_steps: int,
    seed: int,
    if_run_exists: IfRunExists,
    trigger_words: str = "",
    **gathered: Any,
) -> TrainConfig | None:
    """The configuration of a run from the node's inputs. `encoded`: None while it is not known.

    Adds to `problems` that the run name is not allowed, and that settings contradict each other. In the latter case
    there is no configuration. Without an allowed name, the run folder is `-`.
    """
    folder = host_folders.runs_dir()
    name = problems.attempt(lambda: first_name(run_name, if_run_exists)) or "-"
    own = {"run_dir": str(folder / name), "max_train_steps": max_train_steps, "seed": seed}
    build = partial(train_config, model, encoded, own, lora_name=name, trigger_words=trigger_words, **gathered)
    return problems.attempt(build)
