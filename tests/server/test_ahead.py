"""What training would refuse is refused before anything runs, or before the pairs are encoded."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    EMA,
    ENCODE,
    LOAD,
    MEMORY,
    PAIR,
    PLOT,
    TRAIN,
    Prompt,
    cache_entries,
    changed,
    error_of,
    hidden,
    ours,
    pairing,
    place_pairs,
    run_dir,
    training,
)
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

NOWHERE = {**MEMORY, "vram_gib": 0.5}  # less than CUDA itself needs
LORA = {"lora_targets": "pattern", "lora_target_pattern": "no_such_layer"}
MIXED = {"encoded_1": [ENCODE, 0], "repeats_1": 0, "probability_1": 1.0}


@pytest.fixture
def fresh(studio: PackServer) -> str:
    """Pairs that are not encoded yet."""
    folder = "ahead"
    shutil.rmtree(studio.input / folder, ignore_errors=True)
    shutil.rmtree(studio.output / "qwen_edit_trainer" / "cache", ignore_errors=True)
    return place_pairs(studio, folder)


def refused_at_once(studio: PackServer, prompt: Prompt) -> str:
    """Queue a prompt that must be refused at its training node; returns the reason."""
    with pytest.raises(ComfyUIError) as caught:
        studio.queue(prompt)
    (problem,) = caught.value.answer["node_errors"][TRAIN]["errors"]
    assert problem["type"] == "custom_validation_failed"
    return problem["details"].removeprefix("run_name - ")


def refused_before_encoding(studio: PackServer, prompt: Prompt, targets: list[str] | None = None) -> str:
    """Run a prompt that must fail at its encoding node without encoding anything; returns the message."""
    error = error_of(studio.wait(studio.queue(prompt, targets)))
    assert error["node_id"] == ENCODE, error["exception_message"]
    assert not cache_entries(studio, "latents")
    assert not cache_entries(studio, "prompt")
    return error["exception_message"]


@pytest.mark.parametrize(
    ("node_id", "inputs", "says"),
    [
        (
            "optimizer",
            {"lr_scheduler": "cosine", "lr_warmup_steps": 4},
            "lr_warmup_steps must be less than max_train_steps (4) with lr_scheduler cosine, usually at most a tenth "
            "of it, got 4.",
        ),
        (
            "optimizer",
            {"lr_scheduler": "polynomial", "lr_end": "0.02"},
            "Qwen Edit Optimizer Settings: lr_end must be below learning_rate (0.01) with lr_scheduler polynomial, got "
            "0.02.",
        ),
        (
            "optimizer",
            {"optimizer": "adamw-schedulefree"},
            "use_ema must be false with optimizer adamw-schedulefree, which averages the weights itself, got True.",
        ),
        (
            "lora",
            {"rank_pattern": "0-9 = 2000"},
            "Qwen Edit LoRA Settings: rank_pattern must be lines with a whole rank from 1 to 1024, got '0-9 = 2000'.",
        ),
        (
            "validation",
            {"validation_resolution": "big"},
            "Qwen Edit Validation Settings: validation_resolution",
        ),
    ],
)
def test_settings_that_cannot_train_are_refused_at_once(
    node_id: str, inputs: dict[str, Any], says: str, studio: PackServer
):
    prompt = {**training("ahead", 4, ema_settings=["ema", 0]), "ema": EMA}
    assert refused_at_once(studio, changed(prompt, node_id, **inputs)).startswith(says)


def test_a_node_that_refuses_its_own_settings_is_the_only_one_that_does(studio: PackServer):
    prompt = changed(training("ahead", 4), "optimizer", optimizer="prodigy")
    with pytest.raises(ComfyUIError) as caught:
        studio.queue(prompt)
    found = caught.value.answer["node_errors"]
    assert "0.1 to 10 with optimizer prodigy" in found["optimizer"]["errors"][0]["details"]
    assert not found.get(TRAIN, {}).get("errors")


def test_a_linked_folder_is_no_fault_in_the_log(studio: PackServer, fresh: str):
    prompt = {**pairing(fresh, target_folder=["value", 0]), "value": hidden(f"{fresh}/target")}
    before = len(studio.log.read_text())
    assert studio.run(prompt)
    assert "WARNING" not in studio.log.read_text()[before:]


def test_a_setting_from_another_pack_is_left_for_later(studio: PackServer, fresh: str):
    prompt = changed(training("ahead-linked", ["steps", 0], folder=fresh), "optimizer", lr_scheduler="cosine")
    prompt = {
        **changed(prompt, "optimizer", lr_warmup_steps=4),
        "steps": {"class_type": "PrimitiveInt", "inputs": {"value": 4}},
    }
    error = error_of(studio.wait(studio.queue(prompt)))
    assert error["node_id"] == TRAIN
    assert "lr_warmup_steps must be less than max_train_steps (4)" in error["exception_message"]


def test_memory_that_never_fits_is_refused_before_encoding(studio: PackServer, fresh: str):
    prompt = {
        **training("ahead-memory", folder=fresh, memory_settings=["memory", 0]),
        "memory": ours("MemorySettings", **NOWHERE),
    }
    assert refused_before_encoding(studio, prompt).startswith(
        "The run does not fit into memory. With the smallest memory settings"
    )
    mixed = {**changed(prompt, TRAIN, encoded=["mix", 0]), "mix": ours("MixPairs", **MIXED)}
    assert refused_before_encoding(studio, mixed).startswith("The run does not fit into memory.")
    assert not run_dir(studio, "ahead-memory").exists()


def test_all_that_can_be_known_is_refused_before_encoding(studio: PackServer, fresh: str):
    prompt = training("ahead-all", folder=fresh)
    found = refused_before_encoding(studio, changed(prompt, "lora", **LORA))
    assert "no_such_layer" in found
    assert "matches no layer" in found
    found = refused_before_encoding(studio, changed(prompt, "loop", caption_dropout_probability=0.1))
    assert "encode_empty_caption" in found
    pixels = changed(prompt, "loop", edit_weight=0.3, edit_weight_from="pixels")
    assert "encode_pixel_difference" in refused_before_encoding(studio, pixels)
    found = refused_before_encoding(studio, changed(pixels, "loop", caption_dropout_probability=0.1))
    assert "encode_empty_caption" in found
    assert "encode_pixel_difference" in found
    found = refused_before_encoding(studio, changed(prompt, ENCODE, num_eval_images=-1))
    assert "no pairs to train on" in found
    run_dir(studio, "ahead-all").mkdir(parents=True)
    (run_dir(studio, "ahead-all") / "run.json").write_text(json.dumps({"key": {"seed": 7}, "state": "started"}))
    found = refused_before_encoding(studio, changed(prompt, "lora", **LORA))
    assert "was started with other settings" in found
    assert "matches no layer" in found  # all in one list


def test_only_what_is_asked_for_is_checked(studio: PackServer, fresh: str):
    """A page may queue a graph for some of its output nodes."""
    prompt = {
        **training("ahead-part", folder=fresh, memory_settings=["memory", 0]),
        "memory": ours("MemorySettings", **NOWHERE),
    }
    prompt["weights"] = ours("PreviewEditWeight", encoded=[ENCODE, 0], edit_weight=0.5, max_pairs=1)
    wrong = changed(changed(prompt, TRAIN, seed=None), "optimizer", learning_rate=True)
    entry = studio.wait(studio.queue(wrong, ["weights"]))
    assert entry["status"]["status_str"] == "success"
    assert cache_entries(studio, "latents")


def test_a_training_behind_an_output_that_is_asked_for_is_checked(studio: PackServer, fresh: str):
    prompt = {
        **training("ahead-behind", folder=fresh, memory_settings=["memory", 0]),
        "memory": ours("MemorySettings", **NOWHERE),
    }
    assert refused_before_encoding(studio, prompt, [PLOT]).startswith("The run does not fit into memory.")


def test_an_encoding_that_fails_names_the_problems_of_other_nodes(studio: PackServer, fresh: str):
    prompt = changed(training("ahead-others", folder=fresh), ENCODE, tokenizer_max_length=1)
    first, second = refused_before_encoding(studio, changed(prompt, "lora", **LORA)).split("\n2. ")
    assert "tokenizer_max_length" in first
    assert second.startswith("Train Qwen Edit LoRA (advanced): ") and "no_such_layer" in second


def test_a_finished_run_is_not_checked_again(studio: PackServer, fresh: str):
    prompt = training("ahead-done", 1, folder=fresh)
    assert studio.run(prompt)
    shutil.rmtree(studio.output / "qwen_edit_trainer" / "cache")
    again = {**changed(prompt, TRAIN, memory_settings=["memory", 0]), "memory": ours("MemorySettings", **NOWHERE)}
    assert studio.run(again)[TRAIN]["qwen_edit_run"][0]["steps"] == 1


@pytest.mark.parametrize("link", [["optimizer", 0], [TRAIN, 0], ["no", 0], [PAIR, 9], [7, "x"], [["a"], {}]])
def test_links_that_lead_nowhere_are_left_to_comfyui(link: Any, studio: PackServer):
    for node_id, name in ((TRAIN, "max_train_steps"), ("optimizer", "lr_warmup_steps"), (TRAIN, "encoded")):
        with pytest.raises(ComfyUIError):
            studio.queue(changed(training("ahead-links"), node_id, **{name: link}))
    log = studio.log.read_text()
    assert "on_prompt_handler" not in log and "could not be looked at" not in log


def importing(studio: PackServer, folder: str) -> Prompt:
    """Prompt: a training of pairs in this folder that are imported from SimpleTuner, and that never fits."""
    data = [
        {
            "id": "edits",
            "type": "local",
            "instance_data_dir": "target",
            "caption_strategy": "textfile",
            "resolution": 96,
            "conditioning_data": "refs",
        },
        {
            "id": "refs",
            "type": "local",
            "dataset_type": "conditioning",
            "instance_data_dir": "reference_1",
            "conditioning_type": "reference_strict",
        },
        {"id": "embeds", "dataset_type": "text_embeds", "default": True, "type": "local", "cache_dir": "x"},
    ]
    settings = {
        "model_family": "qwen_image",
        "model_flavour": "edit-v2",
        "max_train_steps": 3,
        "lr_scheduler": "polynomial",
        "lr_warmup_steps": 1,
        "num_eval_images": 1,
        "resolution": 96,
        "resolution_type": "pixel",
    }
    settings |= {
        "data_backend_config": "data.json",
        "lora_rank": 4,
        "base_model_precision": "no_change",
        "mixed_precision": "no",
    }
    (studio.input / folder / "config.json").write_text(json.dumps(settings))
    (studio.input / folder / "data.json").write_text(json.dumps(data))
    return {
        "import": ours(
            "ImportSimpleTuner", config_file=f"{folder}/config.json", data_file="", base_model="narrow", changes=""
        ),
        ENCODE: ours("EncodeImported", imported=["import", 0]),
        "memory": ours("MemorySettings", **NOWHERE),
        TRAIN: ours(
            "TrainLora",
            model=["import", 1],
            encoded=[ENCODE, 0],
            validation_encoded=[ENCODE, 1],
            imported=["import", 0],
            run_name="ahead-import",
            max_train_steps=["import", 3],
            seed=["import", 4],
            if_run_exists="continue",
            memory_settings=["memory", 0],
        ),
        PLOT: ours("PlotLoss", run=[TRAIN, 4]),
    }


def test_the_imports_training_is_checked_before_it_is_encoded(studio: PackServer, fresh: str):
    prompt = importing(studio, fresh)
    assert refused_before_encoding(studio, prompt).startswith("The run does not fit into memory.")
    assert LOAD not in prompt


def test_an_import_that_fails_names_the_problems_of_other_nodes(studio: PackServer, fresh: str):
    prompt = importing(studio, fresh)
    (studio.input / fresh / "target" / "000.txt").unlink()
    second = {LOAD: training("x")[LOAD], PAIR: pairing("ahead-second")[PAIR], "held": training("x")[ENCODE]}
    (studio.input / "ahead-second").mkdir(exist_ok=True)
    for side in ("target", "reference_1"):
        (studio.input / "ahead-second" / side).mkdir(exist_ok=True)
    error = error_of(studio.wait(studio.queue({**changed(prompt, TRAIN, validation_encoded=["held", 0]), **second})))
    said = error["exception_message"].splitlines()
    assert said[0].startswith("There are 2 problems."), said
    assert any("target/000" in line for line in said) and any("has no pictures" in line for line in said)
