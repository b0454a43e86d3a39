"""Values of a wrong type in a queued prompt: refused at /prompt by name, before ComfyUI makes other values of them."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import ENCODE, LOAD, PAIR, TRAIN, changed, helper, node, training
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

CAPTIONS = "captions"
WRONG = {"null": None, "true": True, "object": {"a": 1}, "wrapped list": {"__value__": ["x"]}, "infinity": math.inf}
NOT_TEXT = {**WRONG, "false": False, "half": 0.5, "1e308": 1e308, "NaN": math.nan, "65 bits": 2**64}
NOT_A_NUMBER = {**WRONG, "NaN": math.nan, "text": "many", "empty text": ""}
NOT_WHOLE = {**NOT_A_NUMBER, "half": 0.5}
TOO_LARGE = {"65 bits": 2**64}
NOT_A_SWITCH = {**NOT_A_NUMBER, "true": "true", "half": 0.5, "text": "false", "empty text": "", "two": 2}
INPUTS = [
    (CAPTIONS, "caption_prefix", NOT_TEXT, "must be text, got "),
    (PAIR, "target_folder", NOT_TEXT, "must be text, got "),
    (PAIR, "mask_folder", NOT_TEXT, "must be text, got "),
    (TRAIN, "run_name", NOT_TEXT, "must be text, got "),
    (LOAD, "quantised_cache_gb", NOT_A_NUMBER, "must be a finite number, got "),
    ("optimizer", "learning_rate", NOT_A_NUMBER, "must be a finite number, got "),
    (TRAIN, "max_train_steps", NOT_WHOLE, "must be a whole number, got "),
    (TRAIN, "max_train_steps", TOO_LARGE, "must be a whole number of at most 64 bits, got "),
    (ENCODE, "seed", NOT_WHOLE, "must be a whole number, got "),
    (ENCODE, "seed", TOO_LARGE, "must be a whole number of at most 64 bits, got "),
    (PAIR, "references_optional", NOT_A_SWITCH, "must be true or false, got "),
    (ENCODE, "match_target_res", NOT_A_SWITCH, "must be true or false, got "),
]


def graph() -> dict[str, Any]:
    """A training with caption settings."""
    texts = {f"caption_{part}": "" for part in ("prefix", "suffix", "file", "column")} | {"filename_column": ""}
    captions = node("QwenEdit_CaptionSettings", **texts, disable_multiline_split=False, prepend_instance_prompt=False)
    prompt = {**training("types", 2), CAPTIONS: captions}
    return changed(prompt, PAIR, caption_settings=[CAPTIONS, 0])


def problems(studio: PackServer, prompt: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The errors of each node in a prompt that must be refused."""
    with pytest.raises(ComfyUIError) as caught:
        studio.queue(prompt)
    assert caught.value.status == 400
    return {name: found["errors"] for name, found in caught.value.answer["node_errors"].items() if found["errors"]}


@pytest.mark.parametrize(
    ("node_id", "name", "values", "says"), INPUTS, ids=lambda each: each if isinstance(each, str) else ""
)
def test_a_value_of_a_wrong_type_is_refused_by_name(
    node_id: str, name: str, values: dict[str, Any], says: str, studio: PackServer
):
    for what, value in values.items():
        (found,) = problems(studio, changed(graph(), node_id, **{name: value}))[node_id]
        assert f"{name} {says}" in found["details"], what
        assert found["extra_info"]["input_name"] == name
        shown = value["__value__"] if what == "wrapped list" else value
        assert found["details"].endswith(f"{says}{shown!r}."), what


def test_all_wrong_values_of_a_prompt_are_named_at_once(studio: PackServer):
    prompt = changed(changed(graph(), CAPTIONS, caption_prefix=None, caption_suffix=1.5), TRAIN, seed=True)
    found = problems(studio, prompt)
    assert {name: sorted(each["extra_info"]["input_name"] for each in errors) for name, errors in found.items()} == {
        CAPTIONS: ["caption_prefix", "caption_suffix"],
        TRAIN: ["seed"],
    }


@pytest.mark.parametrize("value", [None, True, 7, {"loss": [1]}], ids=repr)
def test_choices_and_links_are_not_taken_for_something_else(value: Any, studio: PackServer):
    allowed = {(LOAD, "base_model"): "text", (TRAIN, "if_run_exists"): "text"}
    allowed |= {(TRAIN, "model"): "connected to an output QWEN_EDIT_MODEL"}
    for (node_id, name), what in allowed.items():
        (found,) = problems(studio, changed(graph(), node_id, **{name: value}))[node_id]
        assert (found["type"], found["details"]) == ("bad_linked_input", name)
        assert found["extra_info"]["received_value"] == [f"{name} must be {what}, got {value!r}."]


def test_long_and_broken_texts_are_refused_briefly(studio: PackServer):
    for text in ("x" * 1_000_000, "a\ud800b", "a\0b"):
        found = problems(studio, changed(graph(), CAPTIONS, caption_prefix=text))[CAPTIONS]
        assert "caption_prefix " in found[0]["details"]
        assert len(json.dumps(found)) < 2_000


def test_values_that_mean_the_same_are_accepted(studio: PackServer):
    prompt = changed(training(20250101, "2"), "optimizer", learning_rate="0.001", lr_warmup_steps=0.0)
    prompt = changed(changed(prompt, ENCODE, match_target_res=1, seed="7"), "lora", lora_rank={"__value__": "2"})
    prompt = changed(prompt, TRAIN, lora_settings=["lora", 0], validation_encoded=None)
    assert studio.run(prompt)
    state = json.loads((studio.output / "qwen_edit_trainer" / "runs" / "20250101" / "config.json").read_text())
    assert (state["max_train_steps"], state["optimizer"]["learning_rate"], state["lora"]["lora_rank"]) == (2, 0.001, 2)


def test_nodes_of_other_packs_are_left_alone(studio: PackServer):
    prompt = {
        "1": node("EmptyImage", width="32", height=32, batch_size=1.0, color=True),
        "2": helper("Digest", value=["1", 0]),
    }
    assert studio.run(prompt)


@pytest.mark.parametrize(
    "prompt", [None, [], {"1": None}, {"1": {"class_type": ["x"]}}, {"1": {"class_type": "QwenEdit_TrainLora"}}]
)
def test_a_malformed_prompt_is_left_to_comfyui(prompt: Any, studio: PackServer):
    with pytest.raises(ComfyUIError):
        studio.queue(prompt)
    log = studio.log.read_text()
    assert "on_prompt_handler" not in log and "could not be looked at" not in log
