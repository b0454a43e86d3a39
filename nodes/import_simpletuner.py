"""Nodes that import a SimpleTuner configuration and encode its datasets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import DEMO_MODEL, DatasetConfig, DatasetPartConfig, JobConfig, ModelConfig
from ..trainer_core.errors import ConfigError
from . import host_call, host_folders, sockets
from .ahead import check_trainings, known_values
from .cache_watch import CACHE_WATCH
from .graph_values import ForeseenPairs, Link
from .queued_runs import runs_fed_by
from .refused import with_other_problems
from .schema import Node, new_input, new_output, node_schema
from .untrusted import file_below, file_below_roots, folder_below, near

if TYPE_CHECKING:
    from ..trainer_core.events import Observer
    from ..trainer_core.job import PairedPart
    from ..trainer_core.simpletuner.convert import Imported

_IGNORED = {
    "output_dir": "the run name comes from Train Qwen Edit LoRA (advanced)",
    "pretrained_transformer_model_name_or_path": "the base model comes from this node",
    "pretrained_vae_model_name_or_path": "the base model comes from this node",
}


class ImportSimpleTuner(Node):
    """Import SimpleTuner's two configuration files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        choices = host_folders.base_models()
        return node_schema(
            "ImportSimpleTuner",
            "Import SimpleTuner Config",
            description="Reads SimpleTuner's config.json and multidatabackend.json for Qwen edit, pairs their folders, "
            "and reports how each key was converted. Does not encode anything yet.",
            search_aliases=["simpletuner", "multidatabackend", "import config"],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            inputs=[
                new_input(
                    io.String,
                    "config_file",
                    default="my_edit/config.json",
                    tooltip="SimpleTuner's config.json, in ComfyUI's input or output folder or another folder the "
                    "server allows. May contain comments and trailing commas.",
                ),
                new_input(
                    io.String,
                    "data_file",
                    default="",
                    tooltip="SimpleTuner's multidatabackend.json. Empty for the one named in config_file, searched "
                    "from config_file's folder upwards. Picture folders are searched in the same way.",
                ),
                new_input(
                    io.Combo,
                    "base_model",
                    options=choices,
                    default=choices[0],
                    tooltip="A Qwen-Image-Edit model in diffusers layout in models/diffusers, or the demo model. "
                    "Flavour and precision come from the configuration.",
                ),
                new_input(
                    io.String,
                    "changes",
                    default="",
                    multiline=True,
                    tooltip="Settings that replace imported ones, one per line: encoding.resolution=512, or "
                    "datasets.my-edits.repeats=2. docs/settings.md lists the names.",
                ),
                new_input(
                    sockets.Model,
                    "other_model",
                    optional=True,
                    tooltip="A model that replaces base_model, for example from Load Qwen Edit Model Files. Its "
                    "precision applies, and its flavour must match the configuration.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, config_file: str | None = None, data_file: str | None = None) -> bool | str:
        """Check that the files are allowed and exist. Linked inputs arrive as None; `execute` checks them."""
        if config_file is not None:
            config = file_below_roots(config_file, host_folders.dataset_roots(), "config_file")
            if data_file:
                _file_near(data_file, config, "data_file")
        return True

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> str | float:
        """A value that changes when a configuration file or a file in one of the picture folders changes."""
        from ..trainer_core.data.pairing import folder_state

        if None in [value for name, value in widgets.items() if name != "other_model"]:
            return math.nan  # equals nothing: a linked name is not known yet
        job, report = _read(**widgets)
        return repr([report, job, [folder_state(part.dataset) for part in job.parts()]])

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs an ImportedJob, its parts for other nodes, and the report."""
        with host_call.short_call() as observer, with_other_problems(cls.hidden, observer):
            return io.NodeOutput(*cls.foresee(observer, **widgets))

    @classmethod
    def foresee(cls, observer: Observer, **widgets: Any) -> tuple[Any, ...]:
        """The outputs, without a running graph."""
        from ..trainer_core.job import pair_job

        job, report = _read(**widgets)
        paired = tuple(pair_job(job, observer))
        return (*_given_out(sockets.ImportedJob(job=job, paired=paired)), report)


def _given_out(imported: sockets.ImportedJob) -> tuple[Any, ...]:
    """All outputs of the import but the report, which is the last."""
    job, datasets = imported.job, [dataset for _, dataset in imported.paired]
    return imported, job.model, datasets, job.max_train_steps, job.seed


def _outputs() -> list[io.Output]:
    return [
        new_output(sockets.Imported, "imported", "For Encode Imported Pairs and Train Qwen Edit LoRA (advanced)."),
        new_output(
            sockets.Model,
            "model",
            "The base model with the configuration's precision, for Train Qwen Edit LoRA (advanced).",
        ),
        sockets.Dataset.Output(
            "dataset",
            display_name="dataset",
            is_output_list=True,
            tooltip="A list of the datasets, for Preview Edit Pairs and Check Edit Pairs.",
        ),
        new_output(io.Int, "max_train_steps", "For Train Qwen Edit LoRA (advanced)."),
        new_output(io.Int, "seed", "For Train Qwen Edit LoRA (advanced)."),
        new_output(
            io.String, "report", "How each key was converted. What is unknown or left out by mistake comes first."
        ),
    ]


class EncodeImported(Node):
    """Encode and mix all datasets of an imported configuration."""

    FORESEEN_WITHOUT = ("clip", "vae")

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "EncodeImported",
            "Encode Imported Pairs",
            description="Encodes each dataset of an imported configuration with its own sizes, and mixes them with "
            "their repeats and probability. Resumes where it was stopped.",
            search_aliases=["cache latents", "text embeddings", "simpletuner"],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
            inputs=[
                new_input(sockets.Imported, "imported", tooltip="From Import SimpleTuner Config."),
                new_input(
                    io.Clip,
                    "clip",
                    optional=True,
                    tooltip="Encode prompts with this text encoder, the one you use for inference, instead of the base "
                    "model's.",
                ),
                new_input(
                    io.Vae,
                    "vae",
                    optional=True,
                    tooltip="Encode pictures with this VAE instead of the base model's.",
                ),
            ],
            outputs=[
                new_output(sockets.Encoded, "encoded", "The encoded pairs, for Train Qwen Edit LoRA (advanced)."),
                new_output(
                    sockets.Encoded,
                    "validation_encoded",
                    "The dataset named by eval_dataset_id, for Train Qwen Edit LoRA (advanced). None if it is not set.",
                ),
                new_output(io.String, "report", "Numbers and sizes of the pairs, and what was skipped."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_widgets: Any) -> str:
        """A value that changes when encoded files are missing from the cache, so that a queued graph encodes again."""
        return CACHE_WATCH.losses()

    @classmethod
    def execute(cls, imported: sockets.ImportedJob, **connected: Any) -> io.NodeOutput:
        """Outputs the EncodedDatasets for training and for validation (or None), and the report."""
        from ..trainer_core.conditioning.report import encoding_report
        from ..trainer_core.job import encode_parts, plan_parts, planned_datasets, trained_parts
        from .host_encoders import connected_encoders

        with host_call.long_call(encodes_for=runs_fed_by(cls.hidden.prompt, cls.hidden.unique_id)) as observer:
            with with_other_problems(cls.hidden, observer):
                encoders = connected_encoders(connected, imported.job.model.flavour)
                planned = plan_parts(imported.job, _paired(imported, connected), encoders, observer)
                parts, outputs = trained_parts(imported.job, planned), planned_datasets(imported.job, planned)
                check_trainings(cls.hidden, _known(cls.hidden, imported), parts, outputs)
            encoded, validation = encode_parts(imported.job, planned, observer)
        reports = [encoding_report(CACHE_WATCH.watch(each)) for each in (encoded, validation) if each is not None]
        return io.NodeOutput(encoded, validation, "\n\n".join(reports))

    @classmethod
    def foresee(
        cls, observer: Observer, imported: sockets.ImportedJob, **connected: Any
    ) -> tuple[ForeseenPairs, ForeseenPairs | None]:
        """The outputs but the report, without a running graph."""
        from ..trainer_core.job import plan_parts, planned_datasets, trained_parts
        from .host_encoders import foreseen_encoders

        job, is_known = imported.job, not connected
        planned = plan_parts(job, _paired(imported, connected), foreseen_encoders(connected), observer)
        encoded, held_out = planned_datasets(job, planned)
        trained, every = trained_parts(job, planned), [dataset for _, dataset in planned]
        pairs = ForeseenPairs(trained=trained, every=every, encoded=encoded, is_cache_known=is_known)
        if held_out is None:
            return pairs, None
        return pairs, ForeseenPairs(trained=[], every=every, encoded=held_out, is_cache_known=is_known)


def _paired(imported: sockets.ImportedJob, connected: Collection[str]) -> Sequence[PairedPart]:
    if "clip" not in connected:
        return imported.paired
    # ComfyUI's CLIP gives no separate picture embeddings to cache
    return [(_without_image_embeds(part), dataset) for part, dataset in imported.paired]


def _known(hidden: Any, imported: sockets.ImportedJob) -> dict[Link, Any]:
    """The outputs of the import node."""
    links = known_values(hidden, {"imported": imported})
    return {(source, number): value for source, _ in links for number, value in enumerate(_given_out(imported))}


def _without_image_embeds(part: DatasetPartConfig) -> DatasetPartConfig:
    plain = dataclasses.replace(part.encoding, conditioning_image_embeds="", create_image_embeds=False)
    return dataclasses.replace(part, encoding=plain)


def _read(
    config_file: str, data_file: str, base_model: str, changes: str, other_model: ModelConfig | None = None
) -> tuple[JobConfig, str]:
    """The job, with checked absolute folders, and the report.

    Raises:
        ConfigError: a file or folder does not exist or is not allowed, or a setting is invalid.
    """
    from ..trainer_core.json_text import read_json
    from ..trainer_core.simpletuner.convert import MAX_BYTES, convert, data_file_of

    config = file_below_roots(config_file, host_folders.dataset_roots(), "config_file")
    settings = read_json(config, config_file.strip()[:200], loose=True, max_bytes=MAX_BYTES)
    named = data_file or data_file_of(settings, f"config_file {config.name}")
    if not named:
        raise ConfigError(
            f"config_file {config.name} has no data_backend_config. Set data_file to the multidatabackend.json."
        )
    data = read_json(_file_near(named, config, "data_file"), named.strip()[:200], loose=True, max_bytes=MAX_BYTES)
    lines = [line.strip() for line in changes.splitlines() if line.strip()]
    imported = convert(settings, data, base=DEMO_MODEL, root=Path(), changes=lines)
    job = dataclasses.replace(
        imported.job,
        model=_model(imported.job.model, base_model, other_model),
        lora=dataclasses.replace(imported.job.lora, init_lora=_listed(imported.job.lora.init_lora)),
        dataset=_allowed(imported.job.dataset, config) if imported.job.dataset else None,
        datasets=tuple(
            dataclasses.replace(part, dataset=_allowed(part.dataset, config)) for part in imported.job.datasets
        ),
        cache_dir=str(host_folders.cache_dir()),
    )
    return job, _report(imported)


def _model(wanted: ModelConfig, base_model: str, given: ModelConfig | None) -> ModelConfig:
    if given is None:
        base, tokenizer = host_folders.base_model(base_model)
        plain = ModelConfig(base=base, tokenizer=tokenizer, device=host_folders.device_name())
        names = ("flavour", "base_model_precision", "mixed_precision", "quantize_via")
        names += ("text_encoder_precision", "quantize_activations", "matmul_precision")
        return dataclasses.replace(plain, **{name: getattr(wanted, name) for name in names})
    if given.flavour != wanted.flavour:
        raise ConfigError(
            f"The configuration is for {wanted.flavour}, but the connected model is {given.flavour}. Connect a "
            f"{wanted.flavour} model, or add the line `model.flavour={given.flavour}` to changes."
        )
    return given


def _listed(init_lora: str) -> str:
    """Path of the LoRA that ComfyUI lists under this name or under its file name."""
    if not init_lora:
        return ""
    listed = host_folders.lora_names()
    return str(host_folders.lora_path(init_lora if init_lora in listed else Path(init_lora).name))


def _file_near(name: str, config: Path, label: str) -> Path:
    """Path of a file named in a configuration, searched from the configuration's folder upwards."""
    roots = host_folders.dataset_roots()
    return file_below_roots(near(name, config.parent, roots, Path.is_file), roots, label)


def _allowed(dataset: DatasetConfig, config: Path) -> DatasetConfig:
    """The dataset with its untrusted folder names replaced by existing folders inside the allowed roots."""
    roots = host_folders.dataset_roots()

    def folder(name: str, label: str) -> str:
        return str(folder_below(near(name, config.parent, roots, Path.is_dir), roots, label))

    target = folder(dataset.target_dir, "instance_data_dir")
    captions = dataset.captions
    if captions.caption_file:
        name = near(captions.caption_file, config.parent, roots, Path.is_file)
        captions = dataclasses.replace(
            captions, caption_file=str(file_below(name, Path(target), roots, "caption_file"))
        )
    return dataclasses.replace(
        dataset,
        target_dir=target,
        reference_dirs=tuple(folder(name, "instance_data_dir") for name in dataset.reference_dirs),
        mask_dir=folder(dataset.mask_dir, "instance_data_dir") if dataset.mask_dir else "",
        captions=captions,
    )


def _report(imported: Imported) -> str:
    """The conversion report, with the keys that other nodes replace marked as ignored."""
    lines = [line for line in imported.report if line.split(":")[0] not in _IGNORED]
    lines += [
        f"{key}: ignored; {_IGNORED[key]}." for key in _IGNORED if any(f"{key}:" in line for line in imported.report)
    ]
    return "\n".join(lines) or "All keys were converted unchanged."
