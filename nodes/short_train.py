"""The training node of the short path, which encodes and trains, and the node for its optional settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import EncodingConfig, ModelConfig, TrainConfig
from ..trainer_core.errors import ConfigError, Interrupted, Problems, SettingsError
from . import host_call, host_folders, sockets, training
from .composed import (
    AUTOMATIC,
    DEMO_PRESET,
    MORE_NODE,
    NAME_LABEL,
    TRAIN_NODE,
    Composed,
    compose,
    is_demo,
    presets_offered,
)
from .overrides import in_words
from .run_names import OR_NEW_NAME, continues_kept, settled
from .schema import CATEGORY, Node, help_of, new_input, new_output, node_schema, setting_input
from .train_config import settings_input
from .untrusted import checked_run_name

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoders import Encoders
    from ..trainer_core.conditioning.encoding_plan import PlannedDataset
    from ..trainer_core.data.pairing import EditDataset
    from ..trainer_core.events import Observer

_AS_PRESET = -2  # num_eval_images of the preset
_DEMO_NOTE = (
    "The demo model is a toy that shows how training works. This LoRA fits no other model. For a real one, choose an "
    "installed model in Qwen Edit Model."
)


class Train(Node):
    """Encode pairs and train a LoRA on them, with a preset's settings."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return training.training_schema(
            "Train",
            TRAIN_NODE,
            _inputs(),
            category=CATEGORY,
            description="Trains a LoRA on pairs and saves it where LoRA loaders list it. A preset for your card sets "
            "everything else. Interrupting keeps the progress; queue the same graph again to resume.",
            search_aliases=["train lora", "edit lora", "finetune", "lora training", "trainer", "qwen"],
        )

    @classmethod
    def validate_inputs(cls, run_name: str | None = None) -> bool | str:
        """Check the run name. A linked one arrives as None."""
        return run_name is None or bool(checked_run_name(run_name, f"The {NAME_LABEL}"))

    @classmethod
    def execute(
        cls,
        model: ModelConfig,
        dataset: EditDataset,
        more_settings: sockets.MoreSettingsGiven | None = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        """Outputs the LoRA's tensors, losses, name, sample grid and run."""
        from ..trainer_core.conditioning.encode import encode_planned

        problems, given = Problems(), chosen(widgets)
        composed = compose(problems, model, more_settings=more_settings, **given)
        problems.raise_all(SettingsError)
        assert composed is not None
        choice = given["if_run_exists"]
        continue_kept = continues_kept(choice)
        with _planning(more_settings) as observer:
            planned = planned_pairs(composed, dataset, more_settings, observer)
            config, note = settled(composed.config, planned.encoded(), choice)
            config = dataclasses.replace(config, encoded=str(planned.encoded().manifest))
            notes = _notes(composed, note)
            result = training.finished(config, continue_kept=continue_kept)
            if result is not None:
                return training.output(result, is_new=False, notes=notes)
            _check(config, planned, continue_kept=continue_kept)
        keep_graph = training.graph_keeper(config, cls.hidden)
        with host_call.long_call(Path(config.run_dir).name, keep_graph) as observer:
            for text in notes:
                observer.on_note(text)
            with _stop_before_training():
                encode_planned(planned, observer)
            result = training.train(config, observer, continue_kept=continue_kept)
        return training.output(result, is_new=True, notes=notes)


def _inputs() -> list[io.Input]:
    return [
        new_input(sockets.Model, "model", tooltip="The model to train on, from Qwen Edit Model."),
        new_input(sockets.Dataset, "dataset", tooltip="The pairs to learn, from Edit Pairs."),
        new_input(
            io.String,
            "run_name",
            display_name=NAME_LABEL,
            default="my_edit",
            tooltip="Name of the LoRA file and of the run folder. A name, not a path.",
        ),
        new_input(
            io.Combo,
            "preset",
            options=presets_offered(),
            default=AUTOMATIC,
            tooltip="The settings of the training. automatic: the preset for the VRAM of your card, or the demo's "
            "for the demo model. Qwen Edit More Settings overrides its part of the preset.",
        ),
        setting_input(
            TrainConfig,
            "max_train_steps",
            default=0,
            min=0,
            tooltip="Number of optimizer steps. 0: the preset's number, 2000 for most cards.",
        ),
        setting_input(TrainConfig, "seed", control_after_generate=False, optional=True, advanced=True),
        training.run_exists_input(OR_NEW_NAME, optional=True, advanced=True),
        new_input(
            sockets.MoreSettings,
            "more_settings",
            optional=True,
            tooltip="Settings that override the preset, from Qwen Edit More Settings.",
        ),
    ]


def chosen(widgets: dict[str, Any]) -> dict[str, Any]:
    """The node's widgets for `compose`, with the defaults of those that a prompt lacks."""
    return {"seed": 0, "if_run_exists": OR_NEW_NAME, **widgets}


@contextmanager
def _planning(more: sockets.MoreSettingsGiven | None) -> Iterator[host_call.NodeObserver]:
    """A context to plan in. Only a connected CLIP makes it necessary to unload ComfyUI's networks."""
    with host_call.long_call() if more and more.clip is not None else host_call.short_call() as observer:
        yield observer


def planned_pairs(
    composed: Composed,
    dataset: EditDataset,
    more: sockets.MoreSettingsGiven | None,
    observer: Observer,
    encoders: Encoders | None = None,
) -> PlannedDataset:
    """The pairs with what the cache lacks of them. `encoders` stand for a CLIP that is not known yet.

    Raises:
        TrainerError: the pairs can't be encoded, or the model or the settings can't be trained; lists everything.
    """
    from ..trainer_core.conditioning.encode import plan_dataset
    from ..trainer_core.planning.preparation import check_training
    from ..trainer_core.qwen_image.base_model import BaseModel
    from .host_encoders import connected_encoders

    base, problems = BaseModel(composed.model), Problems()
    if encoders is None:
        connected = {"clip": more.clip} if more and more.clip is not None else {}
        encoders = connected_encoders(connected, composed.model.flavour)
    problems.attempt(lambda: _check_reference_types(dataset, more))
    cache_dir, encoding = host_folders.cache_dir(), encoding_for(composed, dataset, more)
    planned = problems.attempt(lambda: plan_dataset(dataset, base, encoding, cache_dir, encoders, observer=observer))
    if planned is None:
        problems.attempt(lambda: check_training(composed.config, base))
    problems.raise_all()
    assert planned is not None
    return planned


def encoding_for(composed: Composed, dataset: EditDataset, more: sockets.MoreSettingsGiven | None) -> EncodingConfig:
    """The encoding of these pairs. Few pairs hold out at most a quarter, unless the user sets the number.

    Of fewer than four pairs, the one that is validated is also trained.
    """
    count, wanted = len(dataset.pairs), composed.encoding.num_eval_images
    if dataset.held_out or wanted <= count // 4 or (more and more.num_eval_images is not None):
        return composed.encoding
    fewer = max(1, count // 4)
    return dataclasses.replace(composed.encoding, num_eval_images=fewer, train_eval_images=count < 4)


def _check_reference_types(dataset: EditDataset, more: sockets.MoreSettingsGiven | None) -> None:
    kinds = (more.reference_settings if more else None) or sockets.ReferencesSeen()
    wanted = [kind for kind in kinds.conditioning_types if kind != "auto"]
    if wanted and not any(pair.conditioning_types for pair in dataset.pairs):
        raise ConfigError(
            f"The references are paired without conditioning_type {wanted[0]}. Make the pairs with Pair Edit Folders "
            "and connect Qwen Edit Reference Settings to it too, or set conditioning_type to auto."
        )


def _check(config: TrainConfig, planned: PlannedDataset, *, continue_kept: bool) -> None:
    from ..trainer_core.planning.start import RunData, check_run

    problems, every = Problems(), [planned]
    data = RunData(trained=every, every=every, encoded=planned.encoded())
    check_run(problems, config, data, continue_kept=continue_kept, held_leaves=True)
    problems.raise_all()


@contextmanager
def _stop_before_training() -> Iterator[None]:
    """Says what a stop-and-keep means while pairs are encoded: there is no LoRA to keep yet."""
    try:
        yield
    except Interrupted as stop:
        if not stop.keep:
            raise
        raise Interrupted(
            "Stopped while the pairs were encoded. There is no LoRA to keep yet, but the encoded pairs are kept. Queue "
            "the same graph again to go on."
        ) from stop


def _notes(composed: Composed, note: str) -> list[str]:
    demo = _DEMO_NOTE if is_demo(composed.model) and composed.preset == DEMO_PRESET else ""
    return [text for text in (composed.why, in_words(composed.preset, composed.overridden), note, demo) if text]


class MoreSettings(Node):
    """Collect settings that override a preset."""

    FORESEEN_WITHOUT = ("clip",)

    @classmethod
    def define_schema(cls) -> io.Schema:
        parts = ("lora", "optimizer", "training", "validation", "memory", "ema", "rollout")
        return node_schema(
            "MoreSettings",
            MORE_NODE,
            description="Overrides parts of the preset of Train Qwen Edit LoRA. Each connected settings node replaces "
            "its part. What is not connected stays as the preset has it.",
            search_aliases=["lora settings", "rank", "learning rate", "advanced settings"],
            inputs=[
                *(settings_input(f"{part}_settings", "Default: the preset's.") for part in parts),
                new_input(
                    sockets.SizeSettings,
                    "size_settings",
                    optional=True,
                    tooltip="Sizes and crops. Default: keep the aspect ratio, with an area of resolution squared.",
                ),
                new_input(
                    sockets.ReferenceSettings,
                    "reference_settings",
                    optional=True,
                    tooltip="How references are cropped, presented and cached. Default: all of a pair together.",
                ),
                new_input(
                    io.Clip,
                    "clip",
                    optional=True,
                    tooltip="Encode prompts with this text encoder, the one you use for inference, instead of the "
                    "model's.",
                ),
                setting_input(
                    EncodingConfig,
                    "resolution",
                    optional=True,
                    default=0,
                    min=0,
                    tooltip=f"{help_of(EncodingConfig, 'resolution')} 0: the preset's.",
                ),
                setting_input(
                    EncodingConfig,
                    "num_eval_images",
                    optional=True,
                    default=_AS_PRESET,
                    min=_AS_PRESET,
                    tooltip=f"{help_of(EncodingConfig, 'num_eval_images')} {_AS_PRESET}: the preset's number.",
                ),
                setting_input(
                    EncodingConfig,
                    "validation_negative_prompt",
                    optional=True,
                    multiline=True,
                    default="",
                    tooltip=f"{help_of(EncodingConfig, 'validation_negative_prompt')} Empty: the preset's.",
                ),
                settings_input("preservation_settings", "Default: the preset's."),
            ],
            outputs=[new_output(sockets.MoreSettings, "more_settings", "For Train Qwen Edit LoRA.")],
        )

    @classmethod
    def execute(cls, *, num_eval_images: int = _AS_PRESET, **given: Any) -> io.NodeOutput:
        """Outputs a MoreSettingsGiven."""
        if "clip" in given and given["clip"] is None:
            raise ConfigError("The loader connected to clip delivers None. Connect a separate loader for it.")
        held_out = None if num_eval_images == _AS_PRESET else num_eval_images
        more = sockets.MoreSettingsGiven(num_eval_images=held_out, **given)
        if more.resolution:
            EncodingConfig(resolution=more.resolution)  # raises if it is too small
        return io.NodeOutput(more)
