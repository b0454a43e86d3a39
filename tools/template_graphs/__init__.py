"""The graphs of the templates and of the blueprints. tools/templates.py writes them to workflows/ and subgraphs/.

ComfyUI shows a template under the name of its file and searches that name, so the titles are for people.
"""

from __future__ import annotations

from trainer_core.qwen_image.flavours import FLAVOURS

from .node import Blueprint, Node, Template
from .short import demo, few_step_previews, in_one_node, preservation, train
from .steps import FOLDERS, SCENES, imported, pair_folders, steps, two_datasets
from .use import use

__all__ = ["BLUEPRINTS", "TEMPLATES", "Blueprint", "Node", "Template"]

_2509 = FLAVOURS["edit-v2"].released_as
_RELEASES = (  # flavour, end of the names of its API prompts, name of its example run
    (FLAVOURS["edit-v3"], "2511", "my_edit_2511"),
    (FLAVOURS["edit-v2"], "2509", "my_edit_2509"),
    (FLAVOURS["edit-v1"], "qwen_image_edit", "my_edit"),
)
TEMPLATES: tuple[Template, ...] = (
    demo(),
    *(train(flavour, f"train_{end}", run_name) for flavour, end, run_name in _RELEASES),
    few_step_previews(FLAVOURS["edit-v2"]),
    preservation(FLAVOURS["edit-v3"]),
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
    *(use(flavour, f"use_{end}", run_name) for flavour, end, run_name in _RELEASES),
)
BLUEPRINTS: tuple[Blueprint, ...] = (in_one_node(),)
