"""Wrong inputs are reported as early as possible, at the node that has them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.support.comfyui_server import PackServer
from tools.comfyui import REPO, ComfyUIError, failure

from .conftest import read_json
from .ui_to_api import to_prompt


@pytest.fixture
def prompt(comfyui: PackServer, all_nodes: dict[str, Any]) -> dict[str, Any]:
    """A graph of the demo with every settings node, as an API prompt, with dataset folders that exist."""
    for part in ("target", "reference"):
        (comfyui.input / "validation" / part).mkdir(parents=True, exist_ok=True)
    demo = to_prompt(read_json(REPO / "tests" / "support" / "graphs" / "every_setting.json"), all_nodes)
    _, inputs = node_of(demo, "PairFolders")
    inputs.update(target_folder="validation/target", reference_folder_1="validation/reference")
    return demo


def node_of(prompt: dict[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """Id and inputs of the first node of the class QwenEdit_<name>."""
    return next((key, node["inputs"]) for key, node in prompt.items() if node["class_type"] == f"QwenEdit_{name}")


def refusal(server: PackServer, prompt: dict[str, Any], targets: list[str]) -> dict[str, Any]:
    """The node_errors of a prompt that the server must refuse."""
    with pytest.raises(ComfyUIError) as caught:
        server.queue(prompt, targets)
    return caught.value.answer["node_errors"]


@pytest.mark.parametrize("name", ["../x", "/etc", "C:\\x", "//server/share", "not_there"])
@pytest.mark.parametrize("widget", ["target_folder", "reference_folder_1"])
def test_folders(name: str, widget: str, prompt: dict[str, Any], comfyui: PackServer):
    pairing, inputs = node_of(prompt, "PairFolders")
    preview, _ = node_of(prompt, "PreviewPairs")
    inputs[widget] = name
    errors = refusal(comfyui, prompt, [preview])
    assert list(errors) == [pairing]
    details = errors[pairing]["errors"][0]["details"]
    assert f"{widget} is {name!r}" in details
    assert "Put the folder into one of the folders input, output" in details
    assert str(comfyui.base) not in details


def test_all_folders_that_are_missing_are_named_together(prompt: dict[str, Any], comfyui: PackServer):
    """ComfyUI repeats the message per validated input, so only two are; the node checks the others when it runs."""
    pairing, inputs = node_of(prompt, "PairFolders")
    preview, _ = node_of(prompt, "PreviewPairs")
    inputs.update(target_folder="lost/target", reference_folder_1="lost/reference", reference_folder_3="lost/third")
    errors = refusal(comfyui, prompt, [preview])[pairing]["errors"]
    assert len(errors) == 2
    for error in errors:
        assert "target_folder is 'lost/target', which does not exist. " in error["details"]
        assert "reference_folder_1 is 'lost/reference', which does not exist. Put the folders into" in error["details"]


@pytest.mark.parametrize("name", ["../x", "/etc", "not_there"])
def test_further_folders(name: str, prompt: dict[str, Any], comfyui: PackServer):
    _, inputs = node_of(prompt, "PairFolders")
    preview, _ = node_of(prompt, "PreviewPairs")
    inputs.update(reference_folder_3=name, mask_folder="no masks")
    message = failure(comfyui.wait(comfyui.queue(prompt, [preview])))
    assert f"reference_folder_3 is {name!r}" in message and "mask_folder is 'no masks'" in message
    assert str(comfyui.base) not in message


@pytest.mark.parametrize("text", [b"{", b"\xff\xfe"])
def test_an_imported_file_that_is_wrong_is_named_as_it_was_written(text: bytes, comfyui: PackServer):
    (comfyui.input / "wrong").mkdir(exist_ok=True)
    (comfyui.input / "wrong" / "config.json").write_bytes(text)
    inputs = {"config_file": "wrong/config.json", "data_file": "", "base_model": "demo (embedded)", "changes": ""}
    node = {"class_type": "QwenEdit_ImportSimpleTuner", "inputs": inputs}
    prompt = {"1": node, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 5]}}}
    message = failure(comfyui.wait(comfyui.queue(prompt, ["2"])))
    assert "wrong/config.json is not" in message and str(comfyui.base) not in message


@pytest.mark.parametrize("name", ["../x.json", "/etc/passwd", "C:\\x.json", "not_there.json", "validation"])
def test_imported_files(name: str, comfyui: PackServer):
    node = {"class_type": "QwenEdit_ImportSimpleTuner"}
    inputs = {"config_file": name, "data_file": "", "base_model": "demo (embedded)", "changes": ""}
    prompt = {"1": {**node, "inputs": inputs}, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 5]}}}
    details = refusal(comfyui, prompt, ["2"])["1"]["errors"][0]["details"]
    assert "config_file is" in details and str(comfyui.base) not in details


def test_folders_that_an_imported_file_names_must_be_allowed(comfyui: PackServer):
    """The file is untrusted: it may name only folders that a graph may name."""
    (comfyui.input / "imported").mkdir()
    entries = [
        {"id": "a", "instance_data_dir": "/etc", "conditioning_data": "b"},
        {"id": "b", "dataset_type": "conditioning", "instance_data_dir": "."},
    ]
    (comfyui.input / "imported" / "config.json").write_text('{"model_flavour": "edit-v1",} // short')
    (comfyui.input / "imported" / "data.json").write_text(json.dumps(entries))
    inputs = {"config_file": "imported/config.json", "data_file": "data.json", "base_model": "demo (embedded)"}
    node = {"class_type": "QwenEdit_ImportSimpleTuner", "inputs": {**inputs, "changes": ""}}
    prompt = {"1": node, "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 5]}}}
    message = failure(comfyui.wait(comfyui.queue(prompt, ["2"])))
    assert "instance_data_dir is '/etc', which lies outside the allowed folders" in message


def test_instance_prompt_is_missing(prompt: dict[str, Any], comfyui: PackServer):
    _, inputs = node_of(prompt, "PairFolders")
    preview, _ = node_of(prompt, "PreviewPairs")
    inputs.update(caption_strategy="instanceprompt", instance_prompt=" ")
    assert "instance_prompt must be" in failure(comfyui.wait(comfyui.queue(prompt, [preview])))


@pytest.mark.parametrize("name", ["../x", "a/b", "", "nul", "a" * 81])
def test_run_names(name: str, prompt: dict[str, Any], comfyui: PackServer):
    training, inputs = node_of(prompt, "TrainLora")
    pairing, _ = node_of(prompt, "PairFolders")
    inputs["run_name"] = name
    errors = refusal(comfyui, prompt, [training])
    assert set(errors) == {training, pairing}
    says = "run_name can't be" if name else "run_name is empty. Enter a name"
    assert says in errors[training]["errors"][0]["details"]
    assert "this target folder has no pictures" in errors[pairing]["errors"][0]["details"]


def test_base_model_is_missing(prompt: dict[str, Any], comfyui: PackServer):
    loader, inputs = node_of(prompt, "LoadModel")
    training, _ = node_of(prompt, "TrainLora")
    inputs["base_model"] = "../../etc"
    errors = refusal(comfyui, prompt, [training])
    details = errors[loader]["errors"][0]["details"]
    assert "There is no base model '../../etc' in models/diffusers" in details
    assert "demo (embedded)" in details
    assert node_of(prompt, "PairFolders")[0] in errors  # its folders are empty


def test_base_model_file_is_missing(prompt: dict[str, Any], comfyui: PackServer):
    loader, _ = node_of(prompt, "LoadModel")
    training, _ = node_of(prompt, "TrainLora")
    files = {"transformer_file": "../../x.safetensors", "text_encoder_file": "y.safetensors", "vae_file": "z.ckpt"}
    widgets = {"flavour": "edit-v1", "base_model_precision": "none", "mixed_precision": "no", "quantize_via": "cpu"}
    prompt[loader] = {"class_type": "QwenEdit_LoadModelFiles", "inputs": {**files, **widgets}}
    details = refusal(comfyui, prompt, [training])[loader]["errors"][0]["details"]
    assert "'../../x.safetensors' is not in models/diffusion_models" in details


def test_base_model_files_are_listed_and_looked_into(prompt: dict[str, Any], comfyui: PackServer):
    """Files in subfolders are listed. The node refuses a wrong file before it loads any weights."""
    files = {"transformer_file": "diffusion_models", "text_encoder_file": "text_encoders", "vae_file": "vae"}
    wrong = {"x.lora_A.weight": torch.zeros(2)}
    for folder in files.values():
        place = comfyui.base / "models" / folder / "below"
        place.mkdir(parents=True, exist_ok=True)
        for name in ("wrong.safetensors", "wrong.ckpt", "wrong.gguf"):
            save_file(wrong, place / name)
    listed = comfyui.get("/object_info/QwenEdit_LoadModelFiles")["QwenEdit_LoadModelFiles"]["input"]["required"]
    options = {name: [each for each in listed[name][1]["options"] if each.startswith("below/")] for name in files}
    assert {name for each in options.values() for name in each} == {"below/wrong.safetensors", "below/wrong.gguf"}
    assert options["vae_file"] == ["below/wrong.safetensors"]
    loader, _ = node_of(prompt, "LoadModel")
    widgets = {"flavour": "edit-v1", "base_model_precision": "none", "mixed_precision": "no", "quantize_via": "cpu"}
    chosen = dict.fromkeys(files, "below/wrong.safetensors")
    prompt[loader] = {"class_type": "QwenEdit_LoadModelFiles", "inputs": {**chosen, **widgets}}
    training, _ = node_of(prompt, "TrainLora")
    details = refusal(comfyui, prompt, [training])[loader]["errors"][0]["details"]
    assert "wrong.safetensors is not a Qwen-Image transformer" in details
    assert "looks like a LoRA" in details


def test_lora_is_missing(prompt: dict[str, Any], comfyui: PackServer):
    sample, inputs = node_of(prompt, "SampleEdit")
    shown = next(key for key, node in prompt.items() if node["class_type"] == "PreviewImage")
    inputs["lora_name"] = "../../secret.safetensors"
    errors = refusal(comfyui, prompt, [shown])
    assert "not found" in str(errors[sample]["errors"])


def test_lora_to_start_from_is_missing(prompt: dict[str, Any], comfyui: PackServer):
    settings, inputs = node_of(prompt, "LoraSettings")
    inputs["init_lora"] = "../../secret.safetensors"
    training, _ = node_of(prompt, "TrainLora")
    assert "not found" in str(refusal(comfyui, prompt, [training])[settings]["errors"])


def test_stop_refuses_what_it_does_not_know(comfyui: PackServer):
    for body, status in (({"run_name": "x"}, 404), ({"run_name": "../x"}, 404), ({}, 404), ([], 400), ("x", 400)):
        with pytest.raises(ComfyUIError) as caught:
            comfyui.post("/qwen_edit_trainer/stop", body)
        assert caught.value.status == status
    with pytest.raises(ComfyUIError) as caught:
        comfyui.request("POST", "/qwen_edit_trainer/stop", b'{"run_name": "x"}', "text/plain")
    assert caught.value.status == 400
    with pytest.raises(ComfyUIError) as caught:
        comfyui.request("POST", "/qwen_edit_trainer/stop", b'{"run_name": "' + b"x" * 5000 + b'"}')
    assert caught.value.status == 400


def test_a_choice_of_compile_blocks_that_there_is_not(comfyui: PackServer, prompt: dict[str, Any]):
    training, inputs = node_of(prompt, "TrainLora")
    widgets = {"memory": "auto", "gradient_checkpointing_blocks": -1, "activation_offload": False}
    widgets |= {"blocks_to_stream": 0, "stream_buffers": 2, "compile_blocks": "sometimes", "vram_gib": 0.0}
    prompt["memory"] = {"class_type": "QwenEdit_MemorySettings", "inputs": widgets}
    inputs["memory_settings"] = ["memory", 0]
    errors = refusal(comfyui, prompt, [training])
    assert "compile_blocks must be one of auto, on, off" in errors["memory"]["errors"][0]["details"]


@pytest.mark.parametrize(
    ("widgets", "words"),
    [
        ({"optimizer": "prodigy"}, "set it to 1"),
        ({"optimizer": "adamw-schedulefree", "lr_scheduler": "cosine"}, "replaces a falling rate"),
        ({"lr_scheduler": "constant"}, "lr_warmup_steps must be 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw"),
    ],
)
def test_optimizers_and_schedules_that_do_not_go_together(
    widgets: dict[str, Any], words: str, prompt: dict[str, Any], comfyui: PackServer
):
    settings, inputs = node_of(prompt, "OptimizerSettings")
    inputs.update(widgets)
    errors = refusal(comfyui, prompt, [node_of(prompt, "TrainLora")[0]])
    assert set(errors) == {settings, node_of(prompt, "PairFolders")[0]}  # whose folders are empty
    assert words in errors[settings]["errors"][0]["details"]
