"""The node with settings for how references are cropped, encoded and cached."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..trainer_core.config import ConditioningType, EncodingConfig
from . import sockets
from .schema import Node, new_input, new_output, node_schema, setting_inputs

AS_FIRST = "as the first"


class ReferenceSettings(Node):
    """Choose how references are cropped, presented and cached."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds = list(get_args(ConditioningType))
        return node_schema(
            "ReferenceSettings",
            "Qwen Edit Reference Settings",
            description="How references are cropped, presented and cached. Connect this node to Pair Edit Folders and "
            "Encode Edit Pairs. Without this node, references with the aspect ratio of their target are cropped like "
            "it, all references of a pair are used together, and their latents are cached.",
            search_aliases=["reference_strict", "conditioning_type", "control images"],
            inputs=[
                new_input(
                    io.Combo,
                    "conditioning_type",
                    options=kinds,
                    default="auto",
                    tooltip="References of the first folder. reference_strict: crop like the target; a different "
                    "aspect ratio is an error. reference_loose: never crop. auto: crop like the target if the aspect "
                    "ratios differ by at most 1 %.",
                ),
                *(
                    new_input(
                        io.Combo,
                        f"conditioning_type_{number}",
                        options=[AS_FIRST, *kinds],
                        default=AS_FIRST,
                        tooltip=f"The same for the references of the {word} folder.",
                    )
                    for number, word in ((2, "second"), (3, "third"))
                ),
                *setting_inputs(
                    EncodingConfig,
                    "conditioning_multidataset_sampling conditioning_image_embeds create_image_embeds "
                    "reference_latents",
                ),
            ],
            outputs=[
                new_output(
                    sockets.ReferenceSettings, "reference_settings", "For Pair Edit Folders and for Encode Edit Pairs."
                )
            ],
        )

    @classmethod
    def execute(
        cls, conditioning_type: str, conditioning_type_2: str, conditioning_type_3: str, **widgets: Any
    ) -> io.NodeOutput:
        """Outputs a ReferencesSeen."""
        EncodingConfig(**widgets)  # raises on invalid settings
        kinds = [conditioning_type, conditioning_type_2, conditioning_type_3]
        types = tuple(conditioning_type if kind == AS_FIRST else kind for kind in kinds)
        return io.NodeOutput(sockets.ReferencesSeen(conditioning_types=types, encoding=widgets))
