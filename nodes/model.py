"""The base model as a specification; weights are loaded where they are used, and only there."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer_core.config import ModelConfig
from ..trainer_core.errors import TrainerError
from . import host, sockets
from .schema import new_input, new_output, node_schema, setting_input


class LoadModel(io.ComfyNode):
    """Choose the base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """See web/docs."""
        choices = host.base_models()
        return node_schema(
            "LoadModel",
            "Load Qwen Edit Model",
            description="Chooses the base model to train on and how it is held. Nothing is loaded yet.",
            search_aliases=["qwen image edit", "base model", "lora training"],
            inputs=[
                new_input(
                    io.Combo,
                    "base_model",
                    options=choices,
                    default=choices[0],
                    tooltip="A Qwen-Image-Edit in diffusers' layout below models/diffusers (a folder with transformer, "
                    "vae and text_encoder), or the small embedded demo model.",
                ),
                setting_input(ModelConfig, "flavour"),
                setting_input(ModelConfig, "base_model_precision"),
                setting_input(ModelConfig, "mixed_precision"),
            ],
            outputs=[new_output(sockets.Model, "model", "The choice, for the encode, train and sample nodes.")],
        )

    @classmethod
    def validate_inputs(cls, base_model: str | None = None) -> bool | str:
        """The folder is there."""
        try:
            return base_model is None or bool(host.base_model(base_model))
        except TrainerError as error:
            return str(error)

    @classmethod
    def execute(cls, base_model: str, **widgets: Any) -> io.NodeOutput:
        """A ModelConfig."""
        from ..trainer_core.qwen_image.folder import model_folder

        base, tokenizer = host.base_model(base_model)
        config = ModelConfig(base=base, tokenizer=tokenizer, device=host.device_name(), **widgets)
        model_folder(config)  # raises if parts are missing
        return io.NodeOutput(config)
