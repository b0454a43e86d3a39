"""How references are seen, encoded and kept: for people with more than two folders of pictures."""

from __future__ import annotations

from typing import Any, get_args

from comfy_api.latest import io

from ..trainer_core.config import ConditioningType, EncodingConfig
from . import sockets
from .schema import new_input, new_output, node_schema, setting_input

AS_FIRST = "as the first"


class ReferenceSettings(io.ComfyNode):
    """References beyond the usual."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        kinds = list(get_args(ConditioningType))
        return node_schema(
            "ReferenceSettings",
            "Qwen Edit Reference Settings",
            description="How references are cut, shown and kept. Connect it to Pair Edit Folders and to Encode Edit "
            "Pairs. Without this node: cut as their targets where the shape is the same, all shown together, cached.",
            search_aliases=["reference_strict", "conditioning_type", "control images"],
            inputs=[
                new_input(
                    io.Combo,
                    "conditioning_type",
                    options=kinds,
                    default="auto",
                    tooltip="The first folder's references: reference_strict are cut by the target's rectangle, and "
                    "one of another shape is an error; reference_loose are seen whole; auto are cut where the shape is "
                    "the target's within 1 %.",
                ),
                *(
                    new_input(
                        io.Combo,
                        f"conditioning_type_{number}",
                        options=[AS_FIRST, *kinds],
                        default=AS_FIRST,
                        tooltip=f"The same of the {word} reference folder.",
                    )
                    for number, word in ((2, "second"), (3, "third"))
                ),
                setting_input(EncodingConfig, "conditioning_multidataset_sampling"),
                setting_input(EncodingConfig, "conditioning_image_embeds"),
                setting_input(EncodingConfig, "create_image_embeds"),
                setting_input(EncodingConfig, "reference_latents"),
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
        """ReferencesSeen."""
        EncodingConfig(**widgets)
        kinds = [conditioning_type, conditioning_type_2, conditioning_type_3]
        types = tuple(conditioning_type if kind == AS_FIRST else kind for kind in kinds)
        return io.NodeOutput(sockets.ReferencesSeen(conditioning_types=types, encoding=widgets))
