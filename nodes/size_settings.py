"""The node for sizes and crops."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..trainer_core.config import SizeConfig
from . import sockets
from .schema import Node, new_output, node_schema, setting_inputs


class SizeSettings(Node):
    """Choose sizes and crops."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return node_schema(
            "SizeSettings",
            "Qwen Edit Size Settings",
            description="Sizes and crops of the pictures. Without this node, every picture keeps its aspect ratio and "
            "is scaled to an area of resolution squared.",
            search_aliases=["crop", "resolution type", "aspect bucket"],
            inputs=[
                *setting_inputs(
                    SizeConfig,
                    "resolution_type megapixels aspect_bucket_alignment crop crop_aspect crop_style "
                    "minimum_image_size leave_out_small maximum_image_size target_downsample_size",
                ),
            ],
            outputs=[new_output(sockets.SizeSettings, "size_settings", "For Encode Edit Pairs.")],
        )

    @classmethod
    def execute(cls, **widgets: Any) -> io.NodeOutput:
        """Outputs a SizeConfig."""
        return io.NodeOutput(SizeConfig(**widgets))
