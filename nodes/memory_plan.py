"""The node that estimates the memory of a training run without loading anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import MemoryConfig
from . import sockets
from .overrides import in_words
from .schema import Node, new_input, new_output, node_schema, setting_input
from .train_config import (
    NO_PRESET,
    imported_input,
    preset_input,
    preset_overrides,
    settings_input,
    train_config,
    validation_input,
)

if TYPE_CHECKING:
    from ..trainer_core.conditioning.encoded import EncodedDataset
    from ..trainer_core.config import ModelConfig

_NODE = "Plan Qwen Edit Memory"
_SETTINGS = ("lora", "optimizer", "training", "validation", "memory")


class PlanMemory(Node):
    """Plan the memory of a training run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "PlanMemory",
            _NODE,
            description="Estimates the VRAM and RAM of a training run with these settings, part by part, and "
            "says whether it fits and, on a CUDA device, how long it takes. Loads no weights and changes no files.",
            search_aliases=["vram", "out of memory", "memory estimate"],
            is_output_node=True,
            inputs=[
                new_input(sockets.Model, "model", tooltip="The base model, from Load Qwen Edit Model."),
                new_input(sockets.Encoded, "encoded", tooltip="The pairs to learn, from Encode Edit Pairs."),
                setting_input(
                    MemoryConfig,
                    "vram_gib",
                    "card_gib",
                    tooltip="VRAM in GiB of the card to plan for, in any machine. 0: what is free in this one.",
                ),
                *(settings_input(f"{name}_settings") for name in _SETTINGS),
                preset_input(),
                imported_input(),
                validation_input(),
                settings_input("ema_settings"),
                settings_input("rollout_settings"),
                settings_input("preservation_settings"),
            ],
            outputs=[
                new_output(io.String, "plan", "The plan as text: memory by phase, settings, whether it fits, and time.")
            ],
        )

    @classmethod
    def execute(
        cls, model: ModelConfig, encoded: EncodedDataset, card_gib: float = 0.0, **settings: Any
    ) -> io.NodeOutput:
        """Outputs the plan as text."""
        from ..trainer_core.device import pick_device
        from ..trainer_core.planning.choose import budget_of
        from ..trainer_core.planning.preparation import prepare_model, unmeasured
        from ..trainer_core.planning.report import planned_in_words
        from ..trainer_core.planning.workload import workload_of_encoded
        from ..trainer_core.qwen_image.base_model import BaseModel

        config = train_config(model, encoded, {"run_dir": "plan"}, lora_name="plan", **settings)
        network = prepare_model(config, BaseModel(config.model)).size
        held_out = settings.get("validation_encoded") or encoded
        work = workload_of_encoded(encoded, config.batching, config.validation, held_out)
        device, other_card = pick_device(model.device), card_gib or config.memory.vram_gib
        budget = budget_of(device, other_card, held_leaves=True)
        text, _ = planned_in_words(config, network, work, budget, None if other_card else device)
        preset = settings.get("preset", NO_PRESET)
        by_import = settings.get("imported") is not None
        overridden = in_words(preset, preset_overrides(config, preset, encoded, _NODE, is_imported=by_import))
        text = "\n\n".join(filter(None, [text, overridden, unmeasured(held_out, config.validation)]))
        return io.NodeOutput(text, ui={"text": [text]})
