"""The node that drafts captions for pairs that have none."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer_core.config import CaptionDraftConfig, ModelConfig
from . import host_call, host_folders, sockets
from .dataset import check_folders, dataset_config, folder_inputs, more_references, state_of_folders
from .schema import Node, fields_of, new_input, new_output, node_schema, setting_input, setting_inputs


class DraftCaptions(Node):
    """Draft a caption for each pair that has none."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "DraftCaptions",
            "Draft Edit Captions",
            description="Drafts a caption for each pair that has none: the model's own text encoder looks at the "
            "reference and the target and writes what the edit does into a .txt beside the target. Replaces no file.",
            search_aliases=["auto caption", "captioning", "edit instructions", "describe the edit"],
            is_output_node=True,
            inputs=[
                new_input(
                    sockets.Model, "model", tooltip="The base model, from Qwen Edit Model or Load Qwen Edit Model."
                ),
                *folder_inputs(),
                setting_input(CaptionDraftConfig, "hint", multiline=True),
                *setting_inputs(CaptionDraftConfig, "max_tokens language"),
                more_references(2, "second"),
                more_references(3, "third"),
            ],
            outputs=[new_output(io.String, "report", "For each pair the caption that was written, or why none was.")],
        )

    @classmethod
    def validate_inputs(cls, target_folder: str | None = None, reference_folder_1: str | None = None) -> bool | str:
        """Check that the two required folders are allowed and exist. Linked inputs arrive as None."""
        return check_folders(target_folder, reference_folder_1)

    @classmethod
    def fingerprint_inputs(cls, **widgets: Any) -> str | float:
        """A value that changes when a picture or a caption does, so that a queued graph drafts what is missing now."""
        return state_of_folders(**_folders(widgets))

    @classmethod
    def execute(cls, model: ModelConfig, **widgets: Any) -> io.NodeOutput:
        """Writes the missing captions. Outputs the report."""
        from ..trainer_core.draft_captions import plan_drafts, write_drafts

        settings = CaptionDraftConfig(**fields_of(CaptionDraftConfig, widgets))
        parts = {"dataset": dataset_config(**_folders(widgets))}
        with host_call.short_call() as observer:
            plan = plan_drafts(parts, model, observer, checked_dir=host_folders.checked_dir())
        if plan.missing:
            with host_call.long_call() as observer:
                text = write_drafts(plan, settings, observer)
        else:
            text = plan.as_text()
        text = host_folders.without_paths(text)
        return io.NodeOutput(text, ui={"text": [text]})


def _folders(widgets: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in widgets.items() if "folder" in name}
