"""Configurations of other trainers: from their files to a graph of four nodes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import DEMO_MODEL, DatasetConfig, DatasetPartConfig, JobConfig, ModelConfig
from ..trainer_core.errors import ConfigError, TrainerError
from . import host_call, host_folders, sockets
from .cache_watch import CACHE_WATCH
from .schema import new_input, new_output, node_schema
from .untrusted import file_below, file_below_roots, folder_below, near

if TYPE_CHECKING:
    from ..trainer_core.simpletuner.convert import Imported

_HERE = {
    "output_dir": "the run has the name that Train Qwen Edit LoRA gives it",
    "pretrained_transformer_model_name_or_path": "the base model is chosen at this node",
    "pretrained_vae_model_name_or_path": "the base model is chosen at this node",
}


class ImportSimpleTuner(io.ComfyNode):
    """Read SimpleTuner's two files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        choices = host_folders.base_models()
        return node_schema(
            "ImportSimpleTuner",
            "Import SimpleTuner Config",
            description="Reads SimpleTuner's config.json and multidatabackend.json for Qwen edit, pairs their folders, "
            "and says of every key what became of it. Nothing is encoded yet.",
            search_aliases=["simpletuner", "multidatabackend", "import config"],
            inputs=[
                new_input(
                    io.String,
                    "config_file",
                    default="my_edit/config.json",
                    tooltip="SimpleTuner's config.json, below ComfyUI's input or output folder, or below a folder the "
                    "server's owner allowed. Comments and trailing commas are fine.",
                ),
                new_input(
                    io.String,
                    "data_file",
                    default="",
                    tooltip="Its multidatabackend.json; empty for the one that config_file names, looked for from its "
                    "folder upwards. Folders of pictures are looked for in the same way.",
                ),
                new_input(
                    io.Combo,
                    "base_model",
                    options=choices,
                    default=choices[0],
                    tooltip="A Qwen-Image-Edit in diffusers' layout below models/diffusers, or the demo model. "
                    "Flavour and precision are those of the configuration.",
                ),
                new_input(
                    io.String,
                    "changes",
                    default="",
                    multiline=True,
                    tooltip="Settings to put in place of theirs, one a line: encoding.resolution=512, or "
                    "datasets.my-edits.repeats=2. Names as in docs/settings.md.",
                ),
                new_input(
                    sockets.Model,
                    "other_model",
                    optional=True,
                    tooltip="Another base model, such as one of single files. Then its precision counts, base_model "
                    "doesn't; its flavour must be the configuration's.",
                ),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def validate_inputs(cls, config_file: str | None = None, data_file: str | None = None) -> bool | str:
        """The files are allowed and there; linked values come as None and are checked when they are known."""
        try:
            if config_file is not None:
                config = file_below_roots(config_file, host_folders.dataset_roots(), "config_file")
                if data_file:
                    _file_near(data_file, config, "data_file")
        except TrainerError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> str:
        """Changes when a file of the configuration or in one of its folders does."""
        from ..trainer_core.data.pairing import folder_state

        try:
            job, report = _read(**widgets)
        except TrainerError as error:
            return str(error)  # the node itself will say so
        return repr([report, job, [folder_state(part.dataset) for part in job.parts()]])

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """An ImportedJob and what later nodes need of it."""
        from ..trainer_core.job import pair_job

        job, report = _read(**widgets)
        with host_call.interruptible() as observer:
            paired = tuple(pair_job(job, observer))
        datasets = [dataset for _, dataset in paired]
        imported = sockets.ImportedJob(job=job, paired=paired)
        return io.NodeOutput(imported, job.model, datasets, job.max_train_steps, job.seed, report)


def _outputs() -> list[io.Output]:
    return [
        new_output(sockets.Imported, "imported", "For Encode Imported Pairs and Train Qwen Edit LoRA."),
        new_output(sockets.Model, "model", "The base model as the configuration holds it, for the train node."),
        sockets.Dataset.Output(
            "dataset",
            display_name="dataset",
            is_output_list=True,
            tooltip="Every dataset by itself, for Preview Edit Pairs and Check Edit Pairs.",
        ),
        new_output(io.Int, "max_train_steps", "For the train node."),
        new_output(io.Int, "seed", "For the train node."),
        new_output(io.String, "report", "What became of every key; what was left out comes first."),
    ]


class EncodeImported(io.ComfyNode):
    """Encode every dataset of an imported configuration, and mix them."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        return node_schema(
            "EncodeImported",
            "Encode Imported Pairs",
            description="Encodes all datasets of an imported configuration with their own sizes, and mixes them with "
            "their repeats and probability. Continues where it was stopped.",
            search_aliases=["cache latents", "text embeddings", "simpletuner"],
            inputs=[
                new_input(sockets.Imported, "imported", tooltip="From Import SimpleTuner Config."),
                new_input(
                    io.Clip,
                    "clip",
                    optional=True,
                    tooltip="Encode prompts with this text encoder, the one you make pictures with, instead of the "
                    "base model's.",
                ),
                new_input(
                    io.Vae,
                    "vae",
                    optional=True,
                    tooltip="Encode pictures with this VAE instead of the base model's.",
                ),
            ],
            outputs=[
                new_output(sockets.Encoded, "encoded", "The encoded pairs, for Train Qwen Edit LoRA."),
                new_output(
                    sockets.Encoded,
                    "validation_encoded",
                    "What eval_dataset_id names, for Train Qwen Edit LoRA; nothing if it names nothing.",
                ),
                new_output(io.String, "report", "Numbers of pairs and their sizes, and what was left out."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, **_widgets: Any) -> str:
        """Changes when something encoded has vanished from the cache, so that a queued graph encodes again."""
        return CACHE_WATCH.losses()

    @classmethod
    def execute(cls, imported: sockets.ImportedJob, **connected: Any) -> io.NodeOutput:
        """One or two EncodedDatasets."""
        from ..trainer_core.conditioning.report import encoding_report
        from ..trainer_core.job import encode_paired
        from .host_encoders import connected_encoders

        paired = imported.paired
        if "clip" in connected:  # keeps no visual tokens by themselves
            paired = [(_without_image_embeds(part), dataset) for part, dataset in paired]
        with host_call.long_call() as observer:
            encoders = connected_encoders(connected, imported.job.model.flavour)
            encoded, validation = encode_paired(imported.job, paired, observer, encoders)
        reports = [encoding_report(CACHE_WATCH.watch(each)) for each in (encoded, validation) if each is not None]
        return io.NodeOutput(encoded, validation, "\n\n".join(reports))


def _without_image_embeds(part: DatasetPartConfig) -> DatasetPartConfig:
    plain = dataclasses.replace(part.encoding, conditioning_image_embeds="", create_image_embeds=False)
    return dataclasses.replace(part, encoding=plain)


def _read(
    config_file: str, data_file: str, base_model: str, changes: str, other_model: ModelConfig | None = None
) -> tuple[JobConfig, str]:
    """The job with folders that are allowed and there, and the report."""
    from ..trainer_core.simpletuner.convert import convert
    from ..trainer_core.simpletuner.loose_json import read_loose_json

    config = file_below_roots(config_file, host_folders.dataset_roots(), "config_file")
    settings = read_loose_json(config, config_file.strip()[:200])
    named = data_file or (settings.get("data_backend_config") if isinstance(settings, dict) else None)
    if not isinstance(named, str) or not named:
        raise ConfigError(f"config_file {config.name} names no data_backend_config. Name the file in data_file.")
    data = read_loose_json(_file_near(named, config, "data_file"), named.strip()[:200])
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
        names += ("text_encoder_precision", "quantize_activations")
        return dataclasses.replace(plain, **{name: getattr(wanted, name) for name in names})
    if given.flavour != wanted.flavour:
        raise ConfigError(
            f"The configuration is for {wanted.flavour}, and the connected model is {given.flavour}. Choose a model of "
            f"{wanted.flavour}, or change it with a line `model.flavour={given.flavour}` in changes."
        )
    return given


def _listed(init_lora: str) -> str:
    """The LoRA that ComfyUI lists under the name, or under the last part of it."""
    if not init_lora:
        return ""
    listed = host_folders.lora_names()
    return str(host_folders.lora_path(init_lora if init_lora in listed else Path(init_lora).name))


def _file_near(name: str, config: Path, label: str) -> Path:
    """A file that a configuration names: looked for from the configuration's folder upwards."""
    roots = host_folders.dataset_roots()
    return file_below_roots(near(name, config.parent, roots, Path.is_file), roots, label)


def _allowed(dataset: DatasetConfig, config: Path) -> DatasetConfig:
    """The dataset with existing folders inside the roots in place of the names that a stranger may have written."""
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
    """The report's lines, with what is otherwise in a graph than on the command line."""
    lines = [line for line in imported.report if line.split(":")[0] not in _HERE]
    lines += [f"{key}: left out; {_HERE[key]}." for key in _HERE if any(f"{key}:" in line for line in imported.report)]
    return "\n".join(lines) or "Everything is carried over as it stands."
