"""Untrusted workflows, requests from other origins and honest mistakes get a clear error and change no files.

ComfyUI cannot validate linked inputs before the run, so each value is tested as a widget value and as a linked input.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.narrow import picture
from tests.support.training_graph import (
    ENCODE,
    LOAD,
    PAIR,
    TRAIN,
    changed,
    error_of,
    helper,
    hidden,
    node,
    ours,
    pairing,
    place_pairs,
    training,
)
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

FOLDERS = [
    "{outside}/target",
    "../outside/target",
    "pairs/../../../outside/target",
    "pairs\\..\\..\\outside",
    "leads_out/target",
    "\\\\server\\share",
    "//server/share",
    "C:\\Windows",
    "~/pictures",
    "file:///etc",
    "/etc",
    "pairs/target\x00.png",
    "pairs/target\ud800",
    "x" * 5000,
    "",
]
RUN_NAMES = ["../x", "a/b", "C:\\x", "nul", "NUL.txt", "", ".", "..", "x" * 300, "a\x00b", "a\n", "a\ud800", "-x", "x "]


@pytest.fixture(scope="module")
def outside(studio: PackServer) -> Path:
    """Folder with pictures outside ComfyUI's folders; `leads_out` in the input folder is a symlink to it."""
    folder = studio.base.parent / "outside"
    for part in ("target", "reference_1"):
        (folder / part).mkdir(parents=True)
        picture(7).save(folder / part / "secret.png")
    (folder / "target" / "secret.txt").write_text("a secret")
    (studio.input / "leads_out").symlink_to(folder, target_is_directory=True)
    return folder


def is_a_name(text: str) -> bool:
    """False for texts that no widget accepts, whatever it is for."""
    return len(text) <= 4096 and "\x00" not in text and "\ud800" not in text


def files(studio: PackServer) -> dict[str, int]:
    """Modification time (ns) of every file that these tests must leave unchanged, by path."""
    found = [studio.base.parent / "outside", studio.output, studio.input, studio.base / "models"]
    paths = [path for folder in found for path in folder.rglob("*")]
    return {str(path): path.stat().st_mtime_ns for path in paths if path.is_file()}


def refusal(server: PackServer, prompt: dict[str, Any], node_id: str) -> str:
    """Queue a prompt that validation must reject; returns the reason given for the node."""
    with pytest.raises(ComfyUIError) as caught:
        server.queue(prompt)
    assert caught.value.status == 400
    problems = caught.value.answer["node_errors"][node_id]["errors"]
    types = {problem["type"] for problem in problems}  # one problem per widget
    assert types in ({"custom_validation_failed"}, {"invalid_input_type"}), problems
    return problems[0]["details"]


def failure_at(server: PackServer, prompt: dict[str, Any], node_id: str) -> str:
    """Run a prompt that must fail at this node; returns the error message."""
    error = error_of(server.wait(server.queue(prompt)))
    assert error["node_id"] == node_id
    assert "trainer_core.errors." in error["exception_type"], error["exception_message"]
    return error["exception_message"]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda name: ascii(name)[:30])
def test_folders(folder: str, outside: Path, studio: PackServer):
    name, before = folder.format(outside=outside), files(studio)
    prompts = [pairing(target_folder=name)]
    if name:  # without a first reference folder, the targets are trained as text-to-image
        prompts.append(pairing(reference_folder_1=name))
    for prompt in prompts:
        wanted = "Put the folder into one of the folders input, output" if is_a_name(name) else ", got '"
        assert wanted in refusal(studio, prompt, PAIR)
    for widget in ("reference_folder_2", "mask_folder"):  # optional inputs: empty means none
        said = (failure_at if is_a_name(name) else refusal)(studio, pairing(**{widget: name or ".."}), PAIR)
        assert f"{widget} is" in said or (f"{widget} " in said and not is_a_name(name))
        assert str(studio.base) not in said
    linked = {**pairing(target_folder=["value", 0]), "value": hidden(name)}
    said = failure_at(studio, linked, PAIR)
    assert "target_folder is" in said or ("target_folder " in said and not is_a_name(name))
    assert str(studio.base) not in said
    assert files(studio) == before


def test_a_linked_picture_is_not_read(outside: Path, studio: PackServer):
    place_pairs(studio, "with_link", 2)
    (studio.input / "with_link" / "target" / "001.png").unlink()
    (studio.input / "with_link" / "target" / "001.png").symlink_to(outside / "target" / "secret.png")
    said = failure_at(studio, pairing("with_link"), PAIR)
    assert "001.png" in said
    assert "the link points outside the dataset's folder" in said


@pytest.mark.parametrize("name", RUN_NAMES, ids=lambda name: ascii(name)[:30])
def test_run_names(name: str, outside: Path, studio: PackServer):
    before = files(studio)
    says = ("run_name can't be" if name else "run_name is empty") if is_a_name(name) else "run_name contains"
    assert says in refusal(studio, training(name), TRAIN)
    linked = {**training(["value", 0]), "value": hidden(name)}
    said = failure_at(studio, linked, TRAIN)
    assert says in said
    assert len(said) < 500
    after = {path for path, time in files(studio).items() if before.get(path) != time}
    assert not [path for path in after if "/cache/" not in path]


@pytest.mark.parametrize("name", ["../../etc", "{outside}", "../../../outside", "narrow/../../..", ""])
def test_base_models(name: str, outside: Path, studio: PackServer):
    name = name.format(outside=outside)
    prompt = training("nothing", 2)
    assert "Choose another:" in refusal(studio, changed(prompt, LOAD, base_model=name), LOAD)
    linked = {**changed(prompt, LOAD, base_model=["value", 0]), "value": hidden(name)}
    assert "Choose another:" in failure_at(studio, linked, LOAD)


@pytest.mark.parametrize("name", ["unknown.safetensors", "../../secret.safetensors", "{outside}/x.safetensors"])
def test_lora_names(name: str, outside: Path, studio: PackServer):
    name = name.format(outside=outside)
    (outside / "x.safetensors").write_bytes(b"x")
    sample = {
        "picture": node("LoadImage", image="pairs/reference_1/000.png"),
        LOAD: training("nothing")[LOAD],
        "sample": ours(
            "SampleEdit",
            model=[LOAD, 0],
            reference_1=["picture", 0],
            prompt="",
            negative_prompt="",
            lora_name=name,
            lora_strength=1.0,
            num_inference_steps=1,
            guidance=1.0,
            seed=0,
            resolution=96,
            preprocessing="comfyui",
            match_target_res=True,
        ),
        "digest": helper("Digest", value=["sample", 0]),
    }
    assert "not found" in refusal(studio, sample, "sample")
    linked = {**changed(sample, "sample", lora_name=["value", 0]), "value": hidden(name)}
    assert "not found" in failure_at(studio, linked, "sample")


@pytest.mark.parametrize(
    ("node_id", "setting", "value"),
    [
        (PAIR, "caption_strategy", "exec"),
        (ENCODE, "resolution", 1_000_000),
        (ENCODE, "num_eval_images", -5),
        (ENCODE, "num_eval_images", 5),
        (ENCODE, "preprocessing", "evil"),
        ("lora", "lora_rank", 10**9),
        ("lora", "lora_targets", "everything"),
        ("optimizer", "learning_rate", math.nan),
        ("optimizer", "weight_decay", math.nan),
        ("optimizer", "optimizer", "torch.load"),
        ("loop", "train_batch_size", 0),
        ("loop", "flow_schedule_shift", 0.0),
        ("validation", "validation_guidance", math.nan),
        (TRAIN, "max_train_steps", 0),
        (TRAIN, "max_train_steps", 10**12),
        (TRAIN, "if_run_exists", "destroy"),
        (LOAD, "base_model_precision", "int1"),
        (LOAD, "flavour", "edit-v9"),
    ],
)
def test_settings(node_id: str, setting: str, value: Any, studio: PackServer):
    prompt = training("nothing", 2)
    linked = {**changed(prompt, node_id, **{setting: ["value", 0]}), "value": hidden(value)}
    said = failure_at(studio, linked, node_id)
    assert f"{setting} must be" in said
    assert str(value) in said
    assert not (studio.output / "qwen_edit_trainer" / "runs" / "nothing").exists()


def test_every_missing_and_damaged_file_is_named(studio: PackServer):
    place_pairs(studio, "torn", 6)
    folder = studio.input / "torn"
    for index in (1, 3):
        (folder / "reference_1" / f"{index:03d}.png").unlink()
    damaged = folder / "target" / "004.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (folder / "target" / "005.txt").write_text("  \n")
    said = failure_at(studio, pairing("torn"), PAIR)
    lines = [line for line in said.splitlines() if line.startswith("  - ")]
    assert len(lines) == 4
    for name in ("001", "003", "004", "005"):
        assert sum(name in line for line in lines) == 1, name


def test_a_missing_folder_is_named(studio: PackServer):
    assert "no_such_folder" in refusal(studio, pairing("no_such_folder"), PAIR)


# Routes


def ask(server: PackServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, bytes]:
    """Status and body of the response."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(server.url + path, data, headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=300) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read()


JSON = {"Content-Type": "application/json"}
STOP = "/qwen_edit_trainer/stop"


@pytest.mark.parametrize("prefix", ["", "/api"])
def test_another_origin_is_refused(prefix: str, studio: PackServer):
    body = {"run_name": "x"}
    assert ask(studio, "POST", prefix + STOP, body, Origin="http://evil.example", **JSON)[0] == 403
    assert ask(studio, "GET", prefix + "/qwen_edit_trainer/runs", Origin="http://evil.example")[0] == 403
    assert ask(studio, "POST", prefix + STOP, body, Origin=studio.url, **JSON)[0] == 404  # allowed, but no such run


def test_stop_changes_nothing_by_get(studio: PackServer):
    assert ask(studio, "GET", STOP + "?run_name=x")[0] in (404, 405)


def test_stop_of_an_unknown_run(studio: PackServer):
    status, answer = ask(studio, "POST", STOP, {"run_name": "unknown"}, **JSON)
    assert status == 404
    assert "error" in json.loads(answer)
    for body in (None, [], {"run_name": ["unknown"]}, {"run_name": {"a": 1}}, {"run_name": None}, "x", 5):
        assert ask(studio, "POST", STOP, body, **JSON)[0] in (400, 404), body


@pytest.mark.parametrize(
    ("body", "content"),
    [
        (b"[" * 4000, "application/json"),
        (b'{"run_name": "x"}', "application/json; charset=bogus-8"),
        (b'{"run_name": "\xff"}', "application/json"),
        (b'{"run_name": ' + b"9" * 4000 + b"}", "application/json"),
        (b'{"run_name": "\\ud800"}', "application/json"),
        (b"", "application/json"),
    ],
)
def test_stop_answers_any_body(body: bytes, content: str, studio: PackServer):
    request = urllib.request.Request(studio.url + STOP, body, {"Content-Type": content}, method="POST")
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=300)
    assert refused.value.code in (400, 404)
    assert "error" in json.loads(refused.value.read())


@pytest.mark.parametrize("content", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_stop_takes_no_forms(content: str, studio: PackServer):
    """A page of another origin can send these content types without a CORS preflight, so they must be refused."""
    assert ask(studio, "POST", STOP, {"run_name": "x"}, **{"Content-Type": content})[0] == 400
