"""The short path: a model, pairs, a training, and what a beginner does wrong with them."""

from __future__ import annotations

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import LOAD, changed, ours, training
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

DEMO = "demo (embedded)"
ON_HUB = "https://huggingface.co/Comfy-Org/Qwen-Image{}_ComfyUI/resolve/main/split_files"


def refused(studio: PackServer, prompt: dict, node_id: str) -> str:
    """The only reason why a node is refused when the prompt is queued."""
    with pytest.raises(ComfyUIError) as caught:
        studio.queue(prompt)
    (problem,) = caught.value.answer["node_errors"][node_id]["errors"]
    return problem["details"]


def test_a_model_that_is_not_installed_is_refused_at_once_with_its_downloads(studio: PackServer):
    prompt = {**training("none"), LOAD: ours("ChooseModel", model="qwen_image_edit_2511_fp8mixed.safetensors")}
    said = refused(studio, prompt, LOAD)
    assert said.startswith("model - There are 3 problems.")
    for address in (
        f"{ON_HUB.format('-Edit')}/diffusion_models/qwen_image_edit_2511_fp8mixed.safetensors",
        f"{ON_HUB.format('')}/text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
        f"{ON_HUB.format('')}/vae/qwen_image_vae.safetensors",
    ):
        assert f"from {address} and put it into ComfyUI's folder models/" in said
    assert "vae must be one of 'automatic', got 'x'" in refused(
        studio, changed(prompt, LOAD, model=DEMO, vae="x"), LOAD
    )


def test_the_menu_has_what_is_installed(studio: PackServer):
    info = studio.get("/object_info/QwenEdit_ChooseModel")["QwenEdit_ChooseModel"]
    kind, *options = info["input"]["required"]["model"]
    names = kind if isinstance(kind, list) else options[0]["options"]
    assert names[-1] == DEMO and "narrow" in names
