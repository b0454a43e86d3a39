"""The LoRAs of validated steps on the server: saved by the page, tried by a node; and runs that have not begun yet."""

from __future__ import annotations

import io
import urllib.parse
import urllib.request
from typing import Any

import pytest
from PIL import Image

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    PLOT,
    TRAIN,
    Pressed,
    assert_same_lora,
    error_of,
    ours,
    place_pairs,
    progress_of,
    run_dir,
    training,
)
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

RUNS = "/qwen_edit_trainer/runs"


@pytest.fixture(scope="module")
def run(studio: PackServer) -> dict[str, Any]:
    """A finished training with LoRAs of two steps, as the server describes it."""
    studio.run(training("tried", 4, validate=2))
    return studio.get(f"{RUNS}/tried")


def trial(**changes: Any) -> dict[str, Any]:
    values = {"run_name": "tried", "step": 0, "strength": 1.0, "pair": 1, "picture": "held-out pair", "instruction": ""}
    return {"try": ours("TryLora", **{**values, **changes})}


def viewed(server: PackServer, place: dict[str, str]) -> bytes:
    """The pixels of a picture that the page can show."""
    with urllib.request.urlopen(f"{server.url}/view?{urllib.parse.urlencode(place)}") as answer:
        return Image.open(io.BytesIO(answer.read())).tobytes()


def test_the_page_learns_which_steps_have_a_lora_and_how_the_run_ended(run: dict[str, Any], studio: PackServer):
    psnr = {lora["step"]: lora["psnr"] for lora in run["loras"]}
    assert list(psnr) == [2, 4]
    assert [lora["step"] for lora in run["loras"] if lora["best"]] == [max(psnr, key=lambda step: (psnr[step], step))]
    assert psnr[4] == run["psnr"]["lora"]
    assert run["lora_name"].replace("\\", "/") == "tried/tried.safetensors"
    assert run["seconds"] > 0


def test_a_step_is_saved_where_loaders_list_it(run: dict[str, Any], studio: PackServer):
    seen = len(studio.events)
    saved = studio.post(f"{RUNS}/tried/save_step", {"step": 2})["lora_name"]
    assert saved.replace("\\", "/") == "tried/tried-step-2.safetensors"
    assert studio.post(f"{RUNS}/tried/save_step", {"step": 2})["lora_name"] == saved
    assert saved in studio.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    assert_same_lora(
        studio.output / "loras" / saved, run_dir(studio, "tried") / "samples" / "step-000002" / "lora.safetensors"
    )
    told = [event["data"] for event in studio.events[seen:] if event["type"] == "qwen_edit_trainer.lora"]
    assert {each["lora_name"] for each in told} == {saved}
    for body, words in (
        ({"step": 3}, "404.*step 3.*2, 4"),
        ({"step": "2"}, "400"),
        ({"step": True}, "400"),
        ([], "400"),
    ):
        with pytest.raises(ComfyUIError, match=words):
            studio.post(f"{RUNS}/tried/save_step", body)  # type: ignore[arg-type]
    with pytest.raises(ComfyUIError, match="404"):
        studio.post(f"{RUNS}/unknown/save_step", {"step": 2})


@pytest.mark.parametrize(("asked", "step"), [(0, 4), (2, 2)])
def test_the_node_shows_what_validation_showed(asked: int, step: int, run: dict[str, Any], studio: PackServer):
    outputs = studio.run(trial(step=asked))["try"]
    (tried,) = outputs["qwen_edit_try"]
    assert (tried["run_name"], tried["step"], tried["strength"]) == ("tried", step, 1.0)
    samples = run_dir(studio, "tried") / "samples"
    for column, place in tried["pictures"].items():
        shown = Image.open(samples / f"step-{step:06d}" / f"0-{column}.png").tobytes()
        assert viewed(studio, place) == shown, column
    assert viewed(studio, outputs["images"][0]) == Image.open(samples / f"step-{step:06d}.png").tobytes()
    lora = next(each for each in run["loras"] if each["step"] == step)
    assert tried["psnr"]["lora"] == pytest.approx(lora["psnr"], abs=1e-3)


def test_a_picture_that_changed_is_edited_anew(run: dict[str, Any], studio: PackServer):
    assert run
    shown = []
    for colour in ("red", "blue"):
        Image.new("RGB", (96, 96), colour).save(studio.input / "mine.png")
        outputs = studio.run(trial(picture="mine.png", instruction="turn it grey"))["try"]
        shown.append(viewed(studio, outputs["qwen_edit_try"][0]["pictures"]["reference-1"]))
    assert shown[0] != shown[1]


def test_what_the_node_refuses(run: dict[str, Any], studio: PackServer):
    for changes in ({"run_name": "../tried"}, {"picture": "../x.png"}, {"picture": "/etc/passwd"}):
        with pytest.raises(ComfyUIError, match="400"):
            studio.queue(trial(**changes))
    for changes, words in (
        ({"run_name": "nobody"}, "There is no run 'nobody'."),
        ({"step": 3}, "step 3 of the run 'tried' is not kept"),
        ({"pair": 9}, "held-out pairs 1 to 1"),
    ):
        assert words in error_of(studio.wait(studio.queue(trial(**changes))))["exception_message"]


def test_a_run_is_listed_from_the_moment_it_is_queued(studio: PackServer):
    """Queued, then encoding, then training; its graph can be opened all the time."""
    place_pairs(studio, "for states", 3, sizes=((160, 96),))
    later: dict[str, Any] = {}

    def look() -> None:
        later["id"] = studio.queue(training("later", 2, folder="for states"), [PLOT])  # which needs the training
        later["listed"] = studio.get(RUNS)["runs"][0]
        later["run"] = studio.get(f"{RUNS}/later")
        later["curve"] = studio.get(f"{RUNS}/later/curve")
        later["graph"] = studio.get(f"{RUNS}/later/graph")
        later["begun"] = studio.get(f"{RUNS}/sooner/graph")
        studio.interrupt()

    seen = len(studio.events)
    Pressed(studio, training("sooner", 5000), progress_of(TRAIN, 3, 5000), look).assert_interrupted_at(TRAIN)
    for shown in (later["listed"], later["run"]):
        assert (shown["run_name"], shown["state"], shown["active"]) == ("later", "queued", False)
    assert later["run"]["has_graph"]
    assert later["run"]["samples"] == later["run"]["loras"] == later["curve"]["steps"] == []
    assert later["graph"]["prompt"][TRAIN]["inputs"]["run_name"] == "later"
    assert later["begun"]["prompt"][TRAIN]["inputs"]["run_name"] == "sooner"
    studio.wait(later["id"])
    told = [event["data"] for event in studio.events[seen:] if event["type"] == "qwen_edit_trainer.run"]
    states = dict.fromkeys(each["state"] for each in told if each["run_name"] == "later" and each["active"])
    assert list(states) == ["encoding", "training"]
    assert any(each["phase_total"] > 0 for each in told if each.get("state") == "encoding")
    assert {each["node_id"] for each in told if each["active"]} == {TRAIN}
    assert studio.get(f"{RUNS}/later")["state"] == "finished"
