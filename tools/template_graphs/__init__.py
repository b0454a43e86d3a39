"""The graphs of the templates and of the blueprints. tools/templates.py writes them to workflows/ and subgraphs/.

ComfyUI shows a template under the name of its file and searches that name, so the titles are for people.
"""

from __future__ import annotations

from .node import Blueprint, Node, Template
from .short import demo, in_one_node, train
from .steps import FOLDERS, SCENES, imported, pair_folders, steps, two_datasets
from .use import use

__all__ = ["BLUEPRINTS", "TEMPLATES", "Blueprint", "Node", "Template"]

_2509 = "Qwen/Qwen-Image-Edit-2509"
_RELEASES = (  # release, end of the files' names, transformer file, folder on the hub, name of the example run
    ("2511", "2511", "qwen_image_edit_2511_bf16.safetensors", "Qwen/Qwen-Image-Edit-2511", "my_edit_2511"),
    ("2509", "2509", "qwen_image_edit_2509_fp8_e4m3fn.safetensors", _2509, "my_edit_2509"),
    (
        "Qwen-Image-Edit",
        "qwen_image_edit",
        "qwen_image_edit_fp8_e4m3fn.safetensors",
        "Qwen/Qwen-Image-Edit",
        "my_edit",
    ),
)
TEMPLATES: tuple[Template, ...] = (
    demo(),
    *(train(release, f"train_{end}", file, repository, run) for release, end, file, repository, run in _RELEASES),
    steps("Train with all settings", "train_all_settings", _2509, pair_folders("pairs", FOLDERS), "my_edit_2509"),
    steps(
        "Train with three references",
        "train_three_references",
        _2509,
        pair_folders("pairs", SCENES),
        "my_scenes_2509",
        resolution=768,
    ),
    two_datasets(),
    imported(),
    *(use(release, f"use_{end}", file, run) for release, end, file, _, run in _RELEASES),
)
BLUEPRINTS: tuple[Blueprint, ...] = (in_one_node(),)
