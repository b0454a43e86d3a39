"""Qwen Edit Trainer: LoRAs for Qwen-Image-Edit, trained inside ComfyUI."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"

__all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]

_FOLDER = Path(__file__).parent
_A_NODE = "QwenEdit_TrainLora"


def _loaded_copy() -> Path | None:
    """Folder of another copy of this pack that ComfyUI has loaded; None if there is none."""
    loaded = getattr(sys.modules.get("nodes"), "NODE_CLASS_MAPPINGS", {}).get(_A_NODE)
    file = getattr(sys.modules.get(getattr(loaded, "__module__", "")), "__file__", None)
    folder = Path(file).parent.parent if file else _FOLDER
    return None if folder == _FOLDER else folder


# ComfyUI then lists this copy as IMPORT FAILED, with this message, and uses none of its nodes, routes and scripts. Two
# copies would answer each other's requests.
if _copy := _loaded_copy():
    raise ImportError(
        f"Qwen Edit Trainer is installed twice. ComfyUI uses the copy in {_copy}; the one in {_FOLDER} is left out. "
        "Delete the older of these two folders, and restart ComfyUI."
    )


async def comfy_entrypoint() -> ComfyExtension:
    """What ComfyUI calls to get the nodes."""
    from .nodes.extension import QwenEditTrainer

    return QwenEditTrainer()
