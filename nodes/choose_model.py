"""The model node of the short path: one menu of what is installed; the rest is recognised."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, get_args

from comfy_api.latest import io

from ..trainer_core.config import DEMO_MODEL, BaseModelPrecision, FlavourName, ModelConfig
from ..trainer_core.errors import ConfigError, Problems
from ..trainer_core.qwen_image.flavours import FLAVOURS
from . import host_folders, host_models, sockets
from .composed import AUTOMATIC, plain_model, with_precision
from .model import quantised_dir
from .schema import CATEGORY, Node, new_input, new_output, node_schema


class ChooseModel(Node):
    """Choose an edit model among the installed ones."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        models = host_models.edit_models()
        return node_schema(
            "ChooseModel",
            "Qwen Edit Model",
            category=CATEGORY,
            description="Chooses the edit model to train on. Its release, precision, text encoder and VAE are found "
            "automatically. Does not load it yet.",
            search_aliases=["qwen image edit", "base model", "2511", "2509", "train lora", "edit lora"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                new_input(
                    io.Combo,
                    "model",
                    options=models,
                    default=models[0],
                    tooltip="The edit models in models/diffusion_models and models/diffusers. The demo model is a toy "
                    "that trains in minutes on any computer.",
                ),
                _automatic(
                    "release",
                    [row.release for row in FLAVOURS.values()],
                    "Release of the model. automatic: as its content or its name says.",
                ),
                _automatic(
                    "precision",
                    list(get_args(BaseModelPrecision)),
                    "Format of the frozen weights. automatic: what the preset has for your card; fp8 and int8 files "
                    "stay as they are. none: not quantised. int8-quanto and fp8-quanto: half the size of bf16. "
                    "nf4-bnb and int4-quanto: a quarter.",
                ),
                _automatic(
                    "text_encoder",
                    _files("text_encoders"),
                    "The Qwen2.5-VL-7B file in models/text_encoders. automatic: the one of ComfyUI's templates, or of "
                    "the model's folder.",
                ),
                _automatic(
                    "vae",
                    _files("vae"),
                    "The Qwen-Image VAE in models/vae. automatic: the one of ComfyUI's templates, or of the model's "
                    "folder.",
                ),
            ],
            outputs=[new_output(sockets.Model, "edit_model", "The chosen model, for the train and try nodes.")],
        )

    @classmethod
    def validate_inputs(cls, model: str | None = None) -> bool | str:
        """Check that all files of the model are installed."""
        _ = model  # ComfyUI calls only a method with arguments
        return True

    @classmethod
    def execute(
        cls,
        model: str,
        release: str = AUTOMATIC,
        precision: str = AUTOMATIC,
        text_encoder: str = AUTOMATIC,
        vae: str = AUTOMATIC,
    ) -> io.NodeOutput:
        """Outputs a ModelConfig. Reads only the headers of the files."""
        from ..trainer_core.qwen_image.base_model import BaseModel

        config = (_demo if model == host_folders.DEMO_CHOICE else _chosen)(model, release, text_encoder, vae)
        if precision != AUTOMATIC:
            changed: dict[str, Any] = {"base_model_precision": precision}
            config = dataclasses.replace(plain_model(config), **changed)
        _ = BaseModel(config).network_settings  # raises if files are missing, damaged, or of another release
        return io.NodeOutput(config)


def _automatic(name: str, choices: list[str], tooltip: str) -> io.Input:
    return new_input(
        io.Combo,
        name,
        options=[AUTOMATIC, *choices],
        default=AUTOMATIC,
        optional=True,
        advanced=True,
        tooltip=tooltip,
    )


def _files(folder: str) -> list[str]:
    return [name for name in host_folders.model_files(folder) if name != host_folders.NO_FILE]


def _demo(model: str, release: str, text_encoder: str, vae: str) -> ModelConfig:
    base, tokenizer = host_folders.base_model(model)
    if (text_encoder, vae) != (AUTOMATIC, AUTOMATIC):
        raise ConfigError("The demo model has its own text encoder and VAE. Set text_encoder and vae to automatic.")
    return ModelConfig(
        base=base,
        flavour=host_models.demo_flavour(release),
        mixed_precision="no",
        tokenizer=tokenizer,
        device=host_folders.device_name(),
        quantised_cache_dir=quantised_dir(),
    )


def _chosen(model: str, release: str, text_encoder: str, vae: str) -> ModelConfig:
    """The model with the precision that fits this machine's card.

    Raises:
        ModelFileError: a file is missing, or nobody knows the release. JobError: several of these.
    """
    problems = Problems()
    found = problems.attempt(lambda: host_models.edit_model(model))
    flavour: FlavourName | None = None
    if found is not None:
        flavour = problems.attempt(partial(host_models.flavour_of, found, release))
    is_whole = found is not None and found.folder is not None  # it has a text encoder and a VAE
    text_encoder_file = problems.attempt(lambda: _part(text_encoder, "text_encoders", is_whole=is_whole))
    vae_file = problems.attempt(lambda: _part(vae, "vae", is_whole=is_whole))
    problems.raise_all()
    assert found is not None
    assert flavour is not None
    config = sockets.AutomaticModel(
        flavour=flavour,
        tokenizer="" if is_whole else host_folders.tokenizer_dir(),
        device=host_folders.device_name(),
        base=str(found.folder) if found.folder else DEMO_MODEL,  # as it is without a folder
        transformer_file="" if found.folder else str(found.transformer),
        text_encoder_file=text_encoder_file or "",
        vae_file=vae_file or "",
        quantised_cache_dir=quantised_dir(),
    )
    return with_precision(config)


def _part(name: str, folder: str, *, is_whole: bool) -> str:
    """Path of the text encoder or VAE; empty if the model's folder has it."""
    if name != AUTOMATIC:
        return host_folders.model_file(folder, name)
    if is_whole:
        return ""
    return host_models.text_encoder_file() if folder == "text_encoders" else host_models.vae_file()
