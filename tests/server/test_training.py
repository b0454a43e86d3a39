"""Trainings in a real ComfyUI, from pictures to a LoRA file that ComfyUI's own nodes load."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    BASE,
    EMA,
    PLOT,
    TRAIN,
    assert_same_lora,
    cache_entries,
    changed,
    error_of,
    figures,
    forget,
    helper,
    node,
    ours,
    place_base,
    place_pairs,
    run_dir,
    state_of,
    steps_written,
    training,
)
from tools.comfyui import status_of

pytestmark = pytest.mark.server

STEPS = 6


@pytest.fixture(scope="module")
def first(studio: PackServer) -> dict[str, Any]:
    """Outputs of a complete training with nodes attached to its results."""
    prompt = training("first", STEPS, validate=3)
    prompt["graph"] = node("LossGraphNode", loss=[TRAIN, 1], filename_prefix="loss")
    prompt["own graph"] = ours("PlotLoss", loss_map=[TRAIN, 1])
    prompt["name"] = helper("SaveText", value=[TRAIN, 2])
    prompt["grid"] = node("SaveImage", images=[TRAIN, 3], filename_prefix="grid")
    prompt["shown"] = helper("Digest", value=[PLOT, 0])
    prompt["preview"] = ours("PreviewPairs", dataset=["pair", 0], max_pairs=4)
    return studio.run(prompt)


def test_figures(first: dict[str, Any], studio: PackServer):
    found = figures(first)
    assert (found["run_name"], found["steps"], found["stopped"]) == ("first", STEPS, "no")
    assert found["run_dir"] == "qwen_edit_trainer/runs/first"
    assert all(0 < found[name] < 100 for name in ("psnr_base", "psnr_lora", "psnr_vae"))
    assert (studio.output / found["lora_file"]).is_file()
    assert (studio.output / found["grid_file"]).is_file()
    assert str(studio.base) not in json.dumps(first)  # absolute paths must not be shown


def test_file_and_its_header(first: dict[str, Any], studio: PackServer):
    with safe_open(studio.output / figures(first)["lora_file"], "pt") as file:
        names, header = list(file.keys()), file.metadata()
    assert names
    assert all(name.startswith("diffusion_model.") and ".lora_" in name for name in names)
    assert "negative" in json.dumps(header)


def test_loaders_list_it(first: dict[str, Any], studio: PackServer):
    name = figures(first)["lora_name"]
    assert first["name"]["text"] == [name]
    info = studio.get("/object_info")
    for loader in ("LoraLoader", "LoraLoaderModelOnly", "QwenEdit_SampleEdit"):
        kind, *options = info[loader]["input"]["required"]["lora_name"]
        assert name in (kind if isinstance(kind, list) else options[0]["options"]), loader


def test_pictures(first: dict[str, Any], studio: PackServer):
    (grid,) = first[TRAIN]["images"]
    with Image.open(studio.output / grid["subfolder"] / grid["filename"]) as picture:
        assert picture.width >= 4 * 96
    assert studio.get(f"/view?filename={grid['filename']}&subfolder={grid['subfolder']}&type=output")
    for plot in (PLOT, "graph", "own graph", "grid", "preview"):
        assert first[plot]["images"], plot
    assert first["shown"]["digest"][0]["extent"] > 0.5
    assert "4 pairs" in first["preview"]["text"][0] or "5 pairs" in first["preview"]["text"][0]


def test_run_folder(first: dict[str, Any], studio: PackServer):
    assert steps_written(studio, "first") == list(range(1, STEPS + 1))
    assert state_of(studio, "first")["state"] == "finished"
    assert {path.name for path in (run_dir(studio, "first") / "samples").iterdir()} == {
        "step-000003",
        "step-000003.png",
        "step-000006",
        "step-000006.png",
    }


def test_the_running_average_has_a_name_for_loaders(studio: PackServer):
    """The EMA file is listed for LoRA loaders; if its name is taken (second run), it gets a number."""
    prompt = {**training("averaged", 2, ema_settings=["ema", 0]), "ema": EMA}
    first = figures(studio.run(prompt))
    assert first["ema_lora_name"] == "averaged/averaged-ema.safetensors"
    placed = studio.output / first["ema_file"]
    assert placed == studio.output / "loras" / first["ema_lora_name"]
    assert_same_lora(placed, run_dir(studio, "averaged") / "averaged-ema.safetensors")
    shutil.rmtree(run_dir(studio, "averaged"))
    second = figures(studio.run(changed(prompt, TRAIN, seed=1)))
    assert second["ema_lora_name"] == "averaged/averaged-ema-2.safetensors"
    assert second["lora_name"] == "averaged/averaged-2.safetensors"
    (options, *_) = studio.get("/object_info/LoraLoaderModelOnly")["LoraLoaderModelOnly"]["input"]["required"][
        "lora_name"
    ]
    assert {first["ema_lora_name"], second["ema_lora_name"]} <= set(options)


# Repeated prompts


def stamps(folder: Path) -> dict[str, int]:
    """Modification time (ns) of every file in the folder, by relative path."""
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_again_is_cached(first: dict[str, Any], studio: PackServer):
    prompt = training("first", STEPS, validate=3)
    studio.run(prompt)
    before = stamps(run_dir(studio, "first"))
    prompt_id = studio.queue(prompt)
    entry = studio.wait(prompt_id)
    assert status_of(entry) == "execution_success"
    (cached,) = studio.events_of(prompt_id, "execution_cached")
    assert TRAIN in cached["data"]["nodes"]
    assert stamps(run_dir(studio, "first")) == before


def test_another_graph_finds_the_finished_run(first: dict[str, Any], studio: PackServer):
    """With ComfyUI's cache empty, the result comes from the run folder, without a training step."""
    forget(studio)
    before = stamps(run_dir(studio, "first"))
    prompt_id = studio.queue(training("first", STEPS, validate=3))
    outputs = studio.wait(prompt_id)["outputs"]
    assert figures(outputs)["lora_name"] == figures(first)["lora_name"]
    assert not [event for event in studio.events_of(prompt_id, "progress") if event["data"]["node"] == TRAIN]
    assert stamps(run_dir(studio, "first")) == before


def told(server: PackServer, prompt_id: str) -> dict[str, Any]:
    """The figures as sent to pages: with --cache-none, ComfyUI 0.3.64 drops outputs that were passed to other nodes."""

    def matches(event: dict[str, Any]) -> bool:
        data = event.get("data", {})
        return event["type"] == "executed" and (data["prompt_id"], data["node"]) == (prompt_id, TRAIN)

    return figures({TRAIN: server.wait_for_event(matches)["data"]["output"]})


def test_without_any_cache(comfyui_of_its_own: Callable[..., PackServer], tokenizer_dir: Path):
    server = comfyui_of_its_own("--cache-none")
    place_base(server, tokenizer_dir)
    place_pairs(server)
    prompt = training("none", 3)
    prompt["name"] = helper("SaveText", value=[TRAIN, 2])
    first_id = server.queue(prompt)
    server.wait(first_id)
    first = told(server, first_id)
    before, latents = stamps(run_dir(server, "none")), cache_entries(server, "latents")
    prompt_id = server.queue(prompt)
    server.wait(prompt_id)
    assert latents
    assert cache_entries(server, "latents") == latents
    assert told(server, prompt_id) == first
    assert not [event for event in server.events_of(prompt_id, "progress") if event["data"]["node"] == TRAIN]
    assert stamps(run_dir(server, "none")) == before
    lora = server.output / first["lora_file"]
    assert [path.name for path in lora.parent.iterdir()] == [lora.name]


# Names


def test_two_trainings_in_one_graph(studio: PackServer):
    prompt = training("one", 3)
    prompt["second"] = changed(prompt, TRAIN, run_name="two", seed=1)[TRAIN]
    prompt["twin"] = changed(prompt, TRAIN, run_name="three")[TRAIN]
    outputs = studio.run(prompt)
    one, two, twin = (studio.output / figures(outputs, node_id)["lora_file"] for node_id in (TRAIN, "second", "twin"))
    assert [state_of(studio, name)["state"] for name in ("one", "two", "three")] == ["finished"] * 3
    assert_same_lora(one, twin)
    with pytest.raises(AssertionError):
        assert_same_lora(one, two)


def test_a_name_in_use_is_an_error_at_the_node(first: dict[str, Any], studio: PackServer):
    before = stamps(run_dir(studio, "first"))
    entry = studio.wait(studio.queue(training("first", STEPS, seed=5)))
    error = error_of(entry)
    assert error["node_id"] == TRAIN
    assert "seed: was 0, now 5" in error["exception_message"]
    assert stamps(run_dir(studio, "first")) == before


def test_new_run_gets_a_number(first: dict[str, Any], studio: PackServer):
    found = figures(studio.run(training("first", 2, if_run_exists="new run")))
    assert (found["run_name"], found["steps"]) == ("first-2", 2)
    assert "first-2" in found["lora_name"]


def test_more_steps_go_on_with_a_finished_run(studio: PackServer):
    studio.run(training("longer", 2))
    found = figures(studio.run(training("longer", 4)))
    assert found["steps"] == 4
    assert steps_written(studio, "longer") == [1, 2, 3, 4]


# In the same graph


def sampling(model: list[Any]) -> dict[str, Any]:
    """Prompt nodes that run ComfyUI's sampler on a narrow MODEL."""
    return {
        "condition": helper("Condition", width=128, seed=0),
        "latent": helper("Latent"),
        "drawn": node(
            "KSampler",
            model=model,
            seed=3,
            steps=2,
            cfg=1.0,
            sampler_name="euler",
            scheduler="simple",
            positive=["condition", 0],
            negative=["condition", 0],
            latent_image=["latent", 0],
            denoise=1.0,
        ),
        "digest": helper("Digest", value=["drawn", 0]),
    }


def drawn_with(server: PackServer, graph: dict[str, Any], model: list[Any]) -> str:
    """Hash of the latents that the model samples."""
    prompt = {**graph, "narrow": helper("NarrowModel", base=BASE, num_layers=2), **sampling(model)}
    (digest,) = server.run(prompt)["digest"]["digest"]
    assert digest["finite"]
    assert digest["extent"] > 0.1
    return digest["sha"]


def test_the_lora_works_in_comfyui_by_three_ways(first: dict[str, Any], studio: PackServer):
    trained = training("first", STEPS, validate=3)
    base = drawn_with(studio, {}, ["narrow", 0])
    applied = ours("ApplyLora", model=["narrow", 0], run=[TRAIN, 4], strength=1.0)
    core = node("LoraModelLoader", model=["narrow", 0], lora=[TRAIN, 0], strength_model=1.0)
    asked = studio.get("/object_info/LoraModelLoader")["LoraModelLoader"]["input"]["required"]
    core["inputs"] |= dict.fromkeys(asked.keys() & {"bypass"}, False)  # an input of newer versions
    by_name = node(
        "LoraLoaderModelOnly", model=["narrow", 0], lora_name=figures(first)["lora_name"], strength_model=1.0
    )
    pictures = [
        drawn_with(studio, {**trained, "applied": applied}, ["applied", 0]),
        drawn_with(studio, {**trained, "applied": core}, ["applied", 0]),
        drawn_with(studio, {"applied": by_name}, ["applied", 0]),
    ]
    assert len(set(pictures)) == 1
    assert pictures[0] != base
    off = {**applied, "inputs": {**applied["inputs"], "strength": 0.0}}
    assert drawn_with(studio, {**trained, "applied": off}, ["applied", 0]) == base
    assert drawn_with(studio, {}, ["narrow", 0]) == base


def test_apply_to_a_model_of_another_depth_is_an_error(first: dict[str, Any], studio: PackServer):
    prompt = training("first", STEPS, validate=3)
    prompt["narrow"] = helper("NarrowModel", base=BASE, num_layers=1)
    prompt["applied"] = ours("ApplyLora", model=["narrow", 0], run=[TRAIN, 4], strength=1.0)
    entry = studio.wait(studio.queue({**prompt, **sampling(["applied", 0])}))
    error = error_of(entry)
    assert error["node_id"] == "applied"
    assert "do not match a layer of the model" in error["exception_message"]
    assert "transformer_blocks.1" in error["exception_message"]


def test_sample_with_the_run(first: dict[str, Any], studio: PackServer):
    prompt = training("first", STEPS, validate=3)
    prompt["picture"] = node("LoadImage", image="pairs/reference_1/000.png")
    widgets = {
        "model": ["load", 0],
        "reference_1": ["picture", 0],
        "prompt": "turn it into a negative",
        "negative_prompt": " ",
        "lora_name": "none",
        "lora_strength": 1.0,
        "num_inference_steps": 2,
        "guidance": 2.0,
        "seed": 0,
        "resolution": 96,
        "preprocessing": "comfyui",
        "match_target_res": True,
    }
    prompt["base"] = ours("SampleEdit", **widgets)
    prompt["with run"] = ours("SampleEdit", **{**widgets, "run": [TRAIN, 4]})
    prompt["with name"] = ours("SampleEdit", **{**widgets, "lora_name": figures(first)["lora_name"]})
    for name in ("base", "with run", "with name"):
        prompt[f"{name} digest"] = helper("Digest", value=[name, 0])
    outputs = studio.run(prompt)
    base, run, named = (outputs[f"{name} digest"]["digest"][0] for name in ("base", "with run", "with name"))
    assert base["shape"] == [1, 96, 96, 3]
    assert base["extent"] > 0.1
    assert run == named
    assert run["sha"] != base["sha"]
