"""The short path: a model, pairs, a training, and what a beginner does wrong with them."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    LOAD,
    PAIR,
    TRAIN,
    Pressed,
    Prompt,
    cache_entries,
    changed,
    error_of,
    figures,
    forget,
    ours,
    place_pairs,
    run_dir,
    settings,
    training,
)
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

DEMO = "demo (embedded)"
ON_HUB = "https://huggingface.co/Comfy-Org/Qwen-Image{}_ComfyUI/resolve/main/split_files"
NAME, PAIRS = "short", "short path"
OR_NEW = "continue, or a new name if the settings differ"


def short(**inputs: Any) -> Prompt:
    """A training of the demo model in two steps, with fewer sampling steps and smaller pictures than the preset has."""
    return {
        LOAD: ours("ChooseModel", model=DEMO),
        PAIR: ours("EditPairs", data_set=PAIRS, instruction="turn the photo into a colour negative"),
        **settings(0, 2),
        "more": ours("MoreSettings", validation_settings=["validation", 0], resolution=96),
        TRAIN: ours(
            "Train",
            **{
                "model": [LOAD, 0],
                "dataset": [PAIR, 0],
                "run_name": NAME,
                "preset": "automatic",
                "max_train_steps": 2,
                "more_settings": ["more", 0],
                **inputs,
            },
        ),
    }


@pytest.fixture(scope="module")
def trained(studio: PackServer) -> dict[str, Any]:
    """Outputs of the first training, and the `phases` that pages were told of."""
    place_pairs(studio, PAIRS)
    (studio.input / PAIRS / "reference_1").rename(studio.input / PAIRS / "reference")
    shutil.rmtree(studio.output / "qwen_edit_trainer" / "cache", ignore_errors=True)
    phases: list[str] = []

    def listen(event: dict[str, Any]) -> None:
        data = event.get("data", {})
        if event["type"] == "qwen_edit_trainer.run" and data.get("run_name") == NAME:
            phases.append(data.get("phase", ""))

    studio.on_event = listen
    try:
        return {**studio.run(short()), "phases": phases}
    finally:
        studio.on_event = None


def config_of(studio: PackServer, name: str) -> dict[str, Any]:
    return json.loads((run_dir(studio, name) / "config.json").read_text(encoding="utf-8"))


def test_a_preset_trains_a_lora_in_one_node(trained: dict[str, Any], studio: PackServer):
    found = figures(trained)
    assert (found["run_name"], found["steps"], found["lora_name"]) == (NAME, 2, f"{NAME}/{NAME}.safetensors")
    assert (studio.output / found["grid_file"]).is_file()
    config = config_of(studio, NAME)
    assert (config["lora"]["lora_rank"], config["optimizer"]["learning_rate"]) == (16, 0.005)
    assert config["optimizer"]["lr_warmup_steps"] == 0  # the preset's 5 steps are more than the run has
    assert config["model"]["mixed_precision"] == "no"
    text = trained[TRAIN]["text"][0].splitlines()
    assert text[0] == f"Saved {NAME}/{NAME}.safetensors after 2 steps."
    assert text[1].startswith(f"Use {NAME}/{NAME}.safetensors at strength "), text
    assert text[2].startswith("Likeness to the targets (PSNR, higher is better): "), text
    assert "Preset demo, because the model is the demo model." in text
    assert "- resolution is 96, set by Qwen Edit More Settings. The preset has 128." in text
    assert "- max_train_steps is 2, set by Train Qwen Edit LoRA. The preset has 120." in text
    assert "- validation_num_inference_steps is 2, set by Qwen Edit Validation Settings. The preset has 8." in text
    assert json.loads((run_dir(studio, NAME) / "graph.json").read_text(encoding="utf-8"))["node_id"] == TRAIN
    assert any("ncod" in phase for phase in trained["phases"]), trained["phases"]


def test_other_settings_get_a_new_name_and_the_same_ones_go_on(trained: dict[str, Any], studio: PackServer):
    assert trained
    names = []
    for prompt in (short(), short(seed=1), short(), short(seed=1), short(seed=1, if_run_exists="new run")):
        forget(studio)
        outputs = studio.run(prompt)
        names.append(figures(outputs)["run_name"])
        if len(names) == 2:
            assert (
                f"'{NAME}' was started with other settings or pairs, so it can't be continued. The new run has the "
                f"name '{NAME}-2'. Nothing is overwritten." in (outputs[TRAIN]["text"][0])
            )
    assert names == [NAME, f"{NAME}-2", NAME, f"{NAME}-2", f"{NAME}-3"]
    assert config_of(studio, f"{NAME}-2")["export"]["lora_name"] == f"{NAME}-2"


def test_the_advanced_node_has_the_same_choice(trained: dict[str, Any], studio: PackServer):
    assert trained
    prompt = training("short", 1, if_run_exists=OR_NEW, preset="quality")
    outputs = studio.run(prompt)
    assert figures(outputs)["run_name"] not in (NAME, f"{NAME}-2")
    text = outputs[TRAIN]["text"][0].splitlines()
    assert "- lora_rank is 4, set by Qwen Edit LoRA Settings. The preset has 32." in text
    assert "- resolution is 96, set by Encode Edit Pairs. The preset has 1024." in text
    assert "- match_target_res is True, set by Encode Edit Pairs. The preset has False." in text
    assert "- max_train_steps is 1, set by Train Qwen Edit LoRA (advanced). The preset has 3000." in text
    forget(studio)
    assert figures(studio.run(prompt))["run_name"] == figures(outputs)["run_name"]


def test_all_problems_come_in_one_list_before_anything_is_encoded(trained: dict[str, Any], studio: PackServer):
    assert trained
    shutil.rmtree(studio.output / "qwen_edit_trainer" / "cache")
    prompt = changed(short(seed=7, if_run_exists="continue"), "more", lora_settings=["lora", 0])
    prompt = changed(prompt, "lora", lora_targets="pattern", lora_target_pattern="no_such_layer")
    error = error_of(studio.wait(studio.queue(prompt)))
    assert error["node_id"] == TRAIN
    said = error["exception_message"]
    assert said.startswith("There are 2 problems.")
    assert "seed: was 0, now 7" in said and "no_such_layer" in said
    assert not cache_entries(studio, "latents")


def unpaired(studio: PackServer) -> str:
    """A data set of which one pair lacks a side."""
    folder = "short unpaired"
    if not (studio.input / folder).exists():
        shutil.copytree(studio.input / PAIRS, studio.input / folder)
        (studio.input / folder / "reference" / "001.png").unlink()
    return folder


@pytest.mark.parametrize("pairs", ["EditPairs", "PairFolders"])
def test_a_refusal_names_what_is_wrong_with_the_pairs_too(pairs: str, trained: dict[str, Any], studio: PackServer):
    assert trained
    folder = unpaired(studio)
    prompt = changed(short(run_name="a/b"), LOAD, model="qwen_image_edit_2511_bf16.safetensors")
    prompt = changed(prompt, PAIR, data_set=folder)
    if pairs == "PairFolders":
        sides = {"target_folder": f"{folder}/target", "reference_folder_1": f"{folder}/reference"}
        prompt[PAIR] = ours("PairFolders", caption_strategy="filename", instance_prompt="", **sides)
    with pytest.raises(ComfyUIError) as caught:
        studio.queue(prompt)
    found = caught.value.answer["node_errors"]
    said = {node_id: found[node_id]["errors"][0]["details"] for node_id in (LOAD, PAIR, TRAIN)}
    assert "is not installed. Choose one that is installed: " in said[LOAD]
    assert ". Or download it (40.9 GB) from https://" in said[LOAD]
    assert (
        "001.png: there is no reference (picture before the edit) for it" in said[PAIR]
        and str(studio.base) not in said[PAIR]
    )
    assert "The name of the edit can't be" in said[TRAIN]


def test_pairs_that_fail_name_the_other_problems_too(trained: dict[str, Any], studio: PackServer):
    assert trained
    prompt = changed(short(), PAIR, data_set=unpaired(studio))
    assert error_of(studio.wait(studio.queue(prompt)))["exception_message"].startswith("The data set")
    prompt = changed(prompt, "more", lora_settings=["lora", 0])
    prompt = changed(prompt, "lora", lora_targets="pattern", lora_target_pattern="no_such_layer")
    error = error_of(studio.wait(studio.queue(prompt)))
    assert error["node_id"] == PAIR
    first, second = error["exception_message"].split("\n2. ")
    assert (
        first.startswith("There are 2 problems.")
        and "001.png: there is no reference (picture before the edit) for it" in first
    )
    assert second.startswith("Train Qwen Edit LoRA: ") and "no_such_layer" in second


def test_an_interruption_while_encoding_loses_nothing(trained: dict[str, Any], studio: PackServer):
    assert trained
    many = place_pairs(studio, "short many", 24)
    (studio.input / many / "reference_1").rename(studio.input / many / "reference")
    prompt = changed(short(run_name="broken off early"), PAIR, data_set=many)
    before = cache_entries(studio, "latents").keys()
    Pressed(
        studio, prompt, lambda _event: len(cache_entries(studio, "latents").keys() - before) > 2
    ).assert_interrupted_at(TRAIN)
    kept = cache_entries(studio, "latents")
    assert not run_dir(studio, "broken off early").exists()
    outputs = studio.run(prompt)
    assert figures(outputs)["run_name"] == "broken off early"
    assert kept.items() <= cache_entries(studio, "latents").items()  # by path and time of writing


def test_what_widgets_tell_is_refused_at_once(studio: PackServer):
    prompt = changed(short(preset="8gb"), "more", optimizer_settings=["optimizer", 0])
    prompt = changed(prompt, "optimizer", lr_scheduler="cosine", lr_warmup_steps=2)
    assert "lr_warmup_steps must be less than max_train_steps (2)" in refused(studio, prompt, TRAIN)
    assert "The name of the edit can't be '../x'" in refused(studio, short(run_name="../x"), TRAIN)


def refused(studio: PackServer, prompt: dict[str, Any], node_id: str) -> str:
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
