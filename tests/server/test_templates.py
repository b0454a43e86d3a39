"""API versions of the templates: ComfyUI must accept each one unchanged and run small versions of the trainings."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.comfyui_server import PackServer
from tests.support.narrow import picture
from tests.support.quickstart import CONFIG, EDIT_V1, in_folders
from tests.support.template_files import place_template_files
from tests.support.training_graph import figures, helper, place_base, place_pairs, steps_written
from tools.comfyui import REPO

pytestmark = pytest.mark.server

FOLDER = REPO / "workflows" / "api"
STEPS = sorted(
    path.stem for path in FOLDER.glob("train_*.json") if "QwenEdit_TrainLora" in path.read_text(encoding="utf-8")
)


def template(name: str) -> dict[str, Any]:
    """The API prompt of a shipped template."""
    return json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def inputs_of(prompt: dict[str, Any], class_type: str) -> dict[str, Any]:
    """Inputs of the first node of this class."""
    return next(each["inputs"] for each in prompt.values() if each["class_type"] == class_type)


def place_scenes(studio: PackServer) -> None:
    """Pairs with three references, in folders named as in the template."""
    place_pairs(studio, "my_scenes", num_references=3)
    for number, part in enumerate(("person", "clothes", "place"), 1):
        (studio.input / "my_scenes" / f"reference_{number}").rename(studio.input / "my_scenes" / part)


def place_masked(studio: PackServer, name: str) -> None:
    """Pairs with masks whose left half is white."""
    place_pairs(studio, name, 3)
    folder = studio.input / name
    (folder / "reference_1").rename(folder / "reference")
    (folder / "mask").mkdir()
    for target in (folder / "target").glob("*.png"):
        mask = Image.new("L", (48, 48), 0)
        mask.paste(255, (0, 0, 24, 48))
        mask.save(folder / "mask" / target.name)


@pytest.fixture(scope="module")
def furnished(studio: PackServer, tokenizer_dir: Path) -> PackServer:
    """A server with every file that the templates name: narrow base models, small datasets, other files empty."""
    for name, flavour in (("Qwen-Image-Edit", "edit-v1"), ("Qwen-Image-Edit-2509", "edit-v2")):
        place_base(studio, tokenizer_dir, name, flavour)
    place_pairs(studio, "my_edit")
    (studio.input / "my_edit" / "reference_1").rename(studio.input / "my_edit" / "reference")
    (studio.input / "my_edit" / "config.json").write_text(CONFIG)
    data = in_folders(EDIT_V1, studio.input / "my_edit" / "datasets" / "edits", place="datasets/edits")
    (studio.input / "my_edit" / "multidatabackend.json").write_text(data)
    place_scenes(studio)
    for name in ("my_faces", "my_people"):
        place_masked(studio, name)
    place_template_files(studio.base / "models")
    picture(0).save(studio.input / "example.png")
    return studio


@pytest.fixture
def busy(furnished: PackServer) -> Iterator[PackServer]:
    """A server that is busy, so that prompts are validated and queued but not started."""
    waiting = furnished.queue({"wait": helper("Wait", seconds=1200.0)})
    # A prompt that has not started yet would be cleared with the others, and never end.
    furnished.wait_for_event(lambda event: event["type"] == "executing" and event["data"]["prompt_id"] == waiting)
    yield furnished
    furnished.post("/queue", {"clear": True})
    furnished.interrupt()
    furnished.wait(waiting)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_accepted_as_it_is(name: str, busy: PackServer):
    prompt = template(name)
    answer = busy.post("/prompt", {"prompt": prompt, "client_id": busy.client_id})
    assert answer["node_errors"] == {}
    assert answer["prompt_id"]


@pytest.mark.parametrize("name", STEPS)
def test_training_templates(name: str, furnished: PackServer):
    """Runs with the template's precision and settings, but two steps on narrow models with validation after each, and
    with AdamW, because the 8-bit one needs a GPU."""
    prompt = template(name)
    for node in prompt.values():
        if node["class_type"] == "QwenEdit_EncodePairs":
            node["inputs"]["resolution"] = 96
    inputs_of(prompt, "QwenEdit_TrainLora")["max_train_steps"] = 2
    inputs_of(prompt, "QwenEdit_OptimizerSettings")["optimizer"] = "adamw"
    inputs_of(prompt, "QwenEdit_ValidationSettings").update(
        validation_step_interval=1, validation_num_inference_steps=2
    )
    outputs = furnished.run(prompt)
    training = next(key for key, node in prompt.items() if node["class_type"] == "QwenEdit_TrainLora")
    found = figures(outputs, training)
    assert found["steps"] == 2
    assert (furnished.output / found["lora_file"]).is_file()
    assert steps_written(furnished, found["run_name"]) == [1, 2]
    saved = [name for output in outputs.values() for name in output.get("images", ())]
    assert any(image["filename"].startswith("grid") for image in saved)


def test_import_template(furnished: PackServer):
    """The quickstart's two files are imported as printed, then trained for one step at low resolution."""
    prompt = template("import_simpletuner")
    changes = ("encoding.resolution=96", "encoding.match_target_res=true", "max_train_steps=1", "seed=7")
    smaller = ("validation.validation_num_inference_steps=1", "validation.num_validation_images=1")
    smaller = (*smaller, "validation.validation_resolution=96")
    inputs_of(prompt, "QwenEdit_ImportSimpleTuner")["changes"] = "\n".join((*changes, *smaller))
    inputs_of(prompt, "QwenEdit_TrainLora")["run_name"] = "imported"
    outputs = furnished.run(prompt)
    found = figures(outputs, next(key for key, node in prompt.items() if node["class_type"] == "QwenEdit_TrainLora"))
    assert found["steps"] == 1 and (furnished.output / found["lora_file"]).is_file()
    report = "".join(text for output in outputs.values() for text in output.get("text", ()))
    assert "my-edited-images.conditioning_data: references, in this order: my-reference-images." in report
    run = json.loads((furnished.output / "qwen_edit_trainer" / "runs" / "imported" / "config.json").read_text())
    assert (run["seed"], run["model"]["base_model_precision"], run["model"]["quantize_via"]) == (
        7,
        "int8-quanto",
        "cpu",
    )
    assert (run["noise"]["flow_schedule_shift"], run["batching"]["gradient_accumulation_steps"]) == (1.73, 4)
    assert run["validation"]["validation_guidance"] == 4.0


def test_demo_in_a_few_steps(furnished: PackServer):
    """`make demo` runs the full demo."""
    prompt = template("demo")
    inputs_of(prompt, "QwenEdit_Train")["max_train_steps"] = 6
    outputs = furnished.run(prompt)
    ids = {node["class_type"]: key for key, node in prompt.items()}
    found = figures(outputs, ids["QwenEdit_Train"])
    assert found["steps"] == 6
    assert found["psnr_vae"] > 15
    assert (furnished.output / found["lora_file"]).is_file()
    for name in ("Train", "PreviewPairs", "TryLora"):
        assert outputs[ids[f"QwenEdit_{name}"]]["images"], name
