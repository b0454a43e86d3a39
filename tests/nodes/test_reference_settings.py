"""The settings of the ReferenceSettings node, used in a real ComfyUI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.narrow import make_pairs, picture
from tools.comfyui import ComfyUIError

USUAL: dict[str, Any] = {
    "conditioning_type": "auto",
    "conditioning_type_2": "as the first",
    "conditioning_type_3": "as the first",
    "conditioning_multidataset_sampling": "combined",
    "conditioning_image_embeds": "",
    "create_image_embeds": False,
    "reference_latents": "cached",
}
MODEL = {"base_model": "demo (embedded)", "flavour": "edit-v2", "base_model_precision": "none"}
MODEL |= {"quantize_via": "accelerator", "mixed_precision": "no", "device": "cpu"}


def node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": f"QwenEdit_{kind}", "inputs": inputs}


def graph(name: str, **settings: Any) -> dict[str, Any]:
    folders = {"target_folder": f"{name}/target", "reference_folder_1": f"{name}/reference_1"}
    folders |= {"reference_folder_2": f"{name}/reference_2", "caption_strategy": "textfile", "instance_prompt": ""}
    encoding = {"resolution": 96, "preprocessing": "comfyui", "match_target_res": True, "num_eval_images": 1}
    encoding |= {"validation_negative_prompt": " ", "seed": 0}
    return {
        "1": node("LoadModel", **MODEL),
        "2": node("ReferenceSettings", **{**USUAL, **settings}),
        "3": node("PairFolders", reference_settings=["2", 0], **folders),
        "4": node("EncodePairs", model=["1", 0], dataset=["3", 0], reference_settings=["2", 0], **encoding),
        "5": node("PreviewEditWeight", encoded=["4", 0], edit_weight=0.5, max_pairs=1),
    }


@pytest.fixture
def folders(comfyui: PackServer, request: pytest.FixtureRequest) -> str:
    """Makes three pairs with two references, the second of another shape. Returns their folder below `input`."""
    name = f"seen_{request.node.name}"
    config = make_pairs(comfyui.input / name, 3, num_references=2)
    for number in range(3):
        picture(number + 50, (128, 96)).save(Path(config.reference_dirs[1]) / f"{number:03d}.png")
    return name


def test_all_settings_together(comfyui: PackServer, folders: str) -> None:
    settings = {"conditioning_type": "reference_strict", "conditioning_type_2": "reference_loose"}
    settings |= {"conditioning_multidataset_sampling": "random", "reference_latents": "cached"}
    settings |= {"conditioning_image_embeds": "shared tokens", "create_image_embeds": True}
    assert comfyui.run(graph(folders, **settings))["5"]["images"]
    cache = comfyui.output / "qwen_edit_trainer" / "cache"
    found = [json.loads(path.read_text()) for path in (cache / "datasets").glob("*.json")]
    (manifest,) = (each for each in found if any("alone" in pair for pair in each["pairs"]))
    shapes = [pair["reference_shapes"] for pair in manifest["pairs"]]
    assert shapes == [[[16, 12, 12], [16, 10, 14]]] * 2
    assert len(list((cache / "conditioning_image_embeds" / "shared tokens").rglob("*.safetensors"))) == 5
    settings |= {"reference_latents": "on_the_fly", "create_image_embeds": False}
    with pytest.raises(ComfyUIError, match="so only training can use them"):
        comfyui.run(graph(folders, **settings))


def test_what_is_refused_says_why(comfyui: PackServer, folders: str) -> None:
    with pytest.raises(ComfyUIError, match=r"reference_2/000\.png: the reference is 128 x 96 and its target 96 x 96"):
        comfyui.run(graph(folders, conditioning_type="reference_strict"))
    with pytest.raises(ComfyUIError, match=r"'nowhere', but .*Turn create_image_embeds on"):
        comfyui.run(graph(folders, conditioning_image_embeds="nowhere"))
    with pytest.raises(ComfyUIError, match="a name without folders"):
        comfyui.run(graph(folders, conditioning_image_embeds="../nowhere"))
