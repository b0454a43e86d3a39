"""The node that edits a picture with the trainer's own sampler."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..trainer_core.config import EncodingConfig, ModelConfig, ValidationConfig
from ..trainer_core.errors import ConfigError
from . import host_call, host_folders, sockets
from .schema import Node, new_input, new_output, node_schema, setting_input
from .settings import few_step_file, few_step_inputs

if TYPE_CHECKING:
    from pathlib import Path

    import torch


_NAMES = {  # of validation's settings on this node
    "validation_num_inference_steps": "num_inference_steps",
    "validation_guidance": "guidance",
    "validation_schedule": "schedule",
    "validation_shift": "shift",
    "validation_lora": "few_step_lora",
    "validation_lora_strength": "few_step_strength",
    "validation_lora_steps": "few_step_steps",
}


class SampleEdit(Node):
    """Edit a picture with the base model and a LoRA."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "SampleEdit",
            "Sample With Qwen Edit LoRA",
            description="Edits a picture with the base model and a LoRA, exactly as validation does. For everyday use, "
            "load the LoRA in ComfyUI's own edit graph.",
            search_aliases=["inference", "generate", "test lora"],
            inputs=_inputs(),
            outputs=[new_output(io.Image, "image", "The edited picture.")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None, few_step_lora: str | None = None) -> bool | str:
        """Check that the LoRAs are listed."""
        names = (lora_name, few_step_lora)
        return all(name in (None, host_folders.NO_LORA) or host_folders.lora_path(name) for name in names)

    @classmethod
    def execute(cls, model: ModelConfig, reference_1: torch.Tensor, **values: Any) -> io.NodeOutput:
        """Outputs the edited IMAGE."""
        from ..trainer_core.geometry import Size, bucket_size
        from ..trainer_core.sample import SampleRequest, sample_edit
        from .pictures import image_to_picture, picture_to_image

        images = [reference_1, values.pop("reference_2", None), values.pop("reference_3", None)]
        references = tuple(image_to_picture(image) for image in images if image is not None)
        lora_file = _lora_file(values.pop("lora_name"), values.pop("run", None))
        size = bucket_size(Size(*references[0].size), values.pop("resolution"))
        sampling = {setting: values.pop(name) for setting, name in _NAMES.items() if name in values}
        sampling["validation_lora"] = few_step_file(sampling.get("validation_lora", host_folders.NO_LORA))
        request = SampleRequest(
            model=model,
            references=references,
            lora_file=lora_file,
            size=size,
            sampling=ValidationConfig(**sampling),
            **values,
        )
        with host_call.long_call() as observer:
            return io.NodeOutput(picture_to_image(sample_edit(request, observer)))


def _inputs() -> list[io.Input]:
    reference = "reference picture, for 2509 (edit-v2) and 2511 (edit-v3)."
    return [
        new_input(sockets.Model, "model", tooltip="The base model, from Load Qwen Edit Model."),
        new_input(io.Image, "reference_1", tooltip="The picture to edit. Only the first of a batch is used."),
        new_input(io.String, "prompt", multiline=True, default="", tooltip="Edit instruction, worded as in training."),
        new_input(
            io.String,
            "negative_prompt",
            multiline=True,
            default=" ",
            tooltip="What to avoid. Used when guidance is above 1. A single space is common.",
        ),
        new_input(
            io.Combo,
            "lora_name",
            options=host_folders.lora_names(),
            default=host_folders.NO_LORA,
            tooltip="A LoRA file that ComfyUI lists. none for the base model alone, or when a run is connected.",
        ),
        new_input(
            io.Float,
            "lora_strength",
            default=1.0,
            min=-10.0,
            max=10.0,
            step=0.05,
            tooltip="Strength of the LoRA. 1 is as trained, 0 is off; 0.7 to 1.2 is common.",
        ),
        *_sampling_inputs(),
        new_input(sockets.Run, "run", optional=True, tooltip="Use the LoRA of this run, from Train Qwen Edit LoRA."),
        new_input(io.Image, "reference_2", optional=True, tooltip=f"Second {reference}"),
        new_input(io.Image, "reference_3", optional=True, tooltip=f"Third {reference}"),
        *few_step_inputs(_NAMES),
    ]


def _sampling_inputs() -> list[io.Input]:
    return [
        setting_input(
            ValidationConfig,
            "validation_num_inference_steps",
            name="num_inference_steps",
            tooltip="Number of sampling steps. 30 gives good quality; ComfyUI graphs often use 20.",
        ),
        setting_input(ValidationConfig, "validation_guidance", name="guidance"),
        setting_input(
            ValidationConfig,
            "validation_seed",
            "seed",
            default=0,
            control_after_generate=True,
            tooltip="Seed of the sampling noise.",
        ),
        setting_input(
            EncodingConfig,
            "resolution",
            tooltip="Side in pixels of a square with the area of the result. The aspect ratio is that of reference 1.",
        ),
        setting_input(EncodingConfig, "preprocessing"),
        setting_input(
            EncodingConfig,
            "match_target_res",
            tooltip="Scale references to the size of the result instead of about one megapixel. Use the same as in "
            "training.",
        ),
    ]


def _lora_file(lora_name: str, run: sockets.FinishedRun | None) -> Path | None:
    if run is None:
        return None if lora_name == host_folders.NO_LORA else host_folders.lora_path(lora_name)
    if lora_name != host_folders.NO_LORA:
        raise ConfigError(
            f"A run is connected, but lora_name is {lora_name!r}. Set lora_name to none or disconnect the run."
        )
    return run.lora_file
