"""The node that makes a LoRA part of the frozen base model."""

from __future__ import annotations

import dataclasses

from comfy_api.latest import io

from ..trainer_core.config import FrozenLoraConfig, ModelConfig
from . import host_folders, sockets
from .schema import Node, new_input, new_output, node_schema


class AddModelLora(Node):
    """Add a frozen LoRA to the base model."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "AddModelLora",
            "Add LoRA To Qwen Edit Model",
            description="Makes a LoRA part of the base model, such as a Lightning LoRA or a style. It is not trained "
            "and not saved. Use the trained LoRA together with it, at the same strength.",
            search_aliases=["frozen lora", "lightning", "few-step", "second lora", "lora loader"],
            inputs=[
                new_input(sockets.Model, "model", tooltip="The base model. Several of these nodes can follow it."),
                new_input(
                    io.Combo,
                    "lora_name",
                    options=host_folders.lora_names(),
                    default=host_folders.NO_LORA,
                    tooltip="A LoRA, DoRA or LoKr file that ComfyUI lists. none: change nothing.",
                ),
                new_input(
                    io.Float,
                    "strength",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.05,
                    tooltip="Strength of the LoRA: the one at which you will use it.",
                ),
            ],
            outputs=[
                new_output(
                    sockets.Model, "model_with_lora", "The model with the LoRA, for the encode, train and sample nodes."
                )
            ],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        """Check that the LoRA is listed."""
        return lora_name in (None, host_folders.NO_LORA) or bool(host_folders.lora_path(lora_name))

    @classmethod
    def execute(cls, model: ModelConfig, lora_name: str, strength: float) -> io.NodeOutput:
        """Outputs a ModelConfig. The node that trains or samples reads the file."""
        if lora_name == host_folders.NO_LORA:
            return io.NodeOutput(model)
        lora = FrozenLoraConfig(file=str(host_folders.lora_path(lora_name)), strength=strength)
        return io.NodeOutput(dataclasses.replace(model, frozen_loras=(*model.frozen_loras, lora)))
