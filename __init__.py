"""Qwen Edit Trainer: LoRAs for Qwen-Image-Edit, trained inside ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls to get the nodes."""
    from .nodes.extension import QwenEditTrainer

    return QwenEditTrainer()
