"""Routes and messages about runs: what pages and scripts can read, and what other origins and bad paths cannot."""

from __future__ import annotations

import http.client
import io
import json
from typing import Any

import pytest
from PIL import Image

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import TRAIN, figures, helper, run_dir, training, under_way
from tools.comfyui import ComfyUIError

pytestmark = pytest.mark.server

RUNS = "/qwen_edit_trainer/runs"
STEPS = 6


@pytest.fixture(scope="module")
def run(studio: PackServer) -> dict[str, Any]:
    """A finished training with sample pictures at two steps, and the messages that it sent to pages."""
    prompt, seen = training("watched", STEPS, validate=3), len(studio.events)
    prompt["name"] = helper("SaveText", value=[TRAIN, 2])
    outputs = studio.run(prompt)
    sent = [event for event in studio.events[seen:] if event["type"].startswith("qwen_edit_trainer.")]
    return {"name": figures(outputs)["run_name"], "lora_name": figures(outputs)["lora_name"], "sent": sent}


def asked(server: PackServer, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the response. The path is sent exactly as written, without normalisation."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=300)
    try:
        connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def test_listed(run: dict[str, Any], studio: PackServer):
    listed = studio.get(RUNS)["runs"]
    assert asked(studio, RUNS)[1]["Cross-Origin-Resource-Policy"] == "same-origin"
    (mine,) = [each for each in listed if each["run_name"] == "watched"]
    assert (mine["state"], mine["step"], mine["num_steps"], mine["active"]) == ("finished", STEPS, STEPS, False)
    assert under_way(studio) == []
    assert str(studio.base) not in json.dumps(listed)


def test_messages_to_pages(run: dict[str, Any]):
    told = [event["data"] for event in run["sent"] if event["type"] == "qwen_edit_trainer.run"]
    assert {message["run_name"] for message in told} == {"watched"}
    points = [point for message in told for point in message.get("points", [])]
    assert [point["step"] for point in points if "validation_loss" in point] == [3, 6]
    assert [message["samples"] for message in told if "samples" in message] == [3, 6]
    assert told[0]["node_id"] == TRAIN
    assert told[-1] == {"run_name": "watched", "active": False}
    last = run["sent"][-1]
    assert (last["type"], last["data"]["lora_name"]) == ("qwen_edit_trainer.lora", run["lora_name"])


def test_curve(run: dict[str, Any], studio: PackServer):
    found = studio.get(f"{RUNS}/watched/curve")
    assert found["steps"] == list(range(1, STEPS + 1))
    assert all(loss > 0 for loss in found["loss"])
    assert [step for step, _ in found["measured"]["validation_loss"]] == [3, 6]
    assert len(studio.get(f"{RUNS}/watched/curve?points=2")["steps"]) == 2


def test_pictures(run: dict[str, Any], studio: PackServer):
    first, second = studio.get(f"{RUNS}/watched")["samples"]
    assert (first["step"], second["step"]) == (3, 6)
    assert first["pairs"][0]["columns"] == ["reference-1", "base", "lora", "target"]
    for column in first["pairs"][0]["columns"]:
        status, headers, data = asked(studio, f"{RUNS}/watched/samples/3/0/{column}")
        assert (status, headers["Content-Type"], headers["X-Content-Type-Options"]) == (200, "image/png", "nosniff")
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert data == (run_dir(studio, "watched") / "samples" / "step-000003" / f"0-{column}.png").read_bytes()
    status, headers, data = asked(studio, f"{RUNS}/watched/samples/3/0/lora?edge=64")
    assert (status, headers["Content-Type"]) == (200, "image/jpeg")
    assert max(Image.open(io.BytesIO(data)).size) == 64


def test_settings(run: dict[str, Any], studio: PackServer):
    settings = studio.get(f"{RUNS}/watched/settings")["settings"]
    assert settings["lora"]["lora_rank"] == 4
    assert settings["max_train_steps"] == STEPS
    assert str(studio.base) not in json.dumps(settings)


def test_the_kept_graph_goes_on_with_the_run(run: dict[str, Any], studio: PackServer):
    assert studio.get(f"{RUNS}/watched")["has_graph"]
    prompt = studio.get(f"{RUNS}/watched/graph")["prompt"]
    assert prompt[TRAIN]["inputs"]["run_name"] == "watched"
    prompt[TRAIN]["inputs"]["max_train_steps"] = STEPS + 1
    assert figures(studio.run(prompt))["steps"] == STEPS + 1
    (run_dir(studio, "watched") / "graph.json").unlink()
    assert not studio.get(f"{RUNS}/watched")["has_graph"]
    with pytest.raises(ComfyUIError, match="404"):
        studio.get(f"{RUNS}/watched/graph")


UNKNOWN = [
    "unknown",
    "..",
    "%2e%2e",
    "..%2f..%2foutput",
    "%2fetc",
    "a%5cb",
    "C:%5c",
    "nul",
    "%00",
    "x" * 300,
    "%ff",
    "-x",
]


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("rest", ["", "/curve", "/settings", "/graph", "/samples/3/0/lora"])
def test_no_other_folder_is_reached(name: str, rest: str, run: dict[str, Any], studio: PackServer):
    status, _, answer = asked(studio, f"{RUNS}/{name}{rest}")
    assert status == 404
    assert str(studio.base).encode() not in answer


@pytest.mark.parametrize(
    "rest",
    ["3/0/unknown", "3/0/..", "3/0/..%2f..%2frun.json", "3/9/lora", "3/-1/lora", "4/0/lora", "x/0/lora", "3/x/lora",
     "..%2f..%2f3/0/lora", "%D9%A3/0/lora", f"{'9' * 5000}/0/lora", "3/0/lora?edge=x", "3/0/lora?edge=-1"],
)  # fmt: skip
def test_no_other_picture_is_reached(rest: str, run: dict[str, Any], studio: PackServer):
    assert asked(studio, f"{RUNS}/watched/samples/{rest}")[0] == 404


def test_a_link_out_of_the_runs_is_not_followed(run: dict[str, Any], studio: PackServer):
    secret = studio.base / "secret"
    secret.mkdir()
    (secret / "run.json").write_text('{"state": "finished"}')
    picture = run_dir(studio, "watched") / "samples" / "step-000003" / "0-base.png"
    kept = picture.read_bytes()
    Image.new("RGB", (8, 8)).save(secret / "secret.png")
    (run_dir(studio, "watched").parent / "linked").symlink_to(secret)
    picture.unlink()
    picture.symlink_to(secret / "secret.png")
    try:
        status, _, answer = asked(studio, f"{RUNS}/linked")
        assert status == 404
        assert json.loads(answer)["error"].startswith(
            "This run's folder is a link that leads out of the folder of runs"
        )
        assert asked(studio, f"{RUNS}/watched/samples/3/0/base")[0] == 404
        assert "linked" not in {each["run_name"] for each in studio.get(RUNS)["runs"]}
    finally:
        (run_dir(studio, "watched").parent / "linked").unlink()
        picture.unlink()
        picture.write_bytes(kept)


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "config.json", "graph.json", "samples"])
def test_a_link_out_of_a_run_is_not_followed(name: str, run: dict[str, Any], studio: PackServer):
    secret, mine = studio.base / f"secret of {name}", run_dir(studio, "watched") / name
    kept = mine.with_name("kept")
    if mine.is_dir():
        secret.mkdir()
    else:
        secret.write_text('{"state": "finished", "step": 77777, "loss": 1.0}')
    if mine.exists():  # another test deletes the graph
        mine.rename(kept)
    mine.symlink_to(secret)
    try:
        for rest in ("", "/curve", "/settings", "/graph", "/samples/3/0/lora"):
            status, _, answer = asked(studio, f"{RUNS}/watched{rest}")
            assert status == 404
            assert b"77777" not in answer
        assert "watched" not in {each["run_name"] for each in studio.get(RUNS)["runs"]}
    finally:
        mine.unlink()
        if kept.exists():
            kept.rename(mine)
    assert asked(studio, f"{RUNS}/watched")[0] == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),  # another port of this machine
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Host": "trainer.example", "Origin": "http://evil.example"}, 403),  # ComfyUI checks loopback hosts only
        ({"Host": "trainer.example", "Origin": "https://trainer.example"}, 200),
        ({"Host": "evil.example:8188", "Origin": "http://evil.example:8188"}, 403),  # DNS rebinding
        ({"Host": "evil.example:8188"}, 403),
        ({"Origin": "http://127.0.0.1:35313.evil"}, 403),  # ComfyUI's own check fails for it
        ({"Host": "192.168.1.20:8188", "Origin": "http://192.168.1.20:8188"}, 200),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "none"}, 200),
        ({}, 200),
    ],
)
@pytest.mark.parametrize("path", [RUNS, f"{RUNS}/watched", f"{RUNS}/watched/samples/3/0/lora"])
def test_pages_of_other_origins(path: str, headers: dict[str, str], status: int, run, studio: PackServer):
    assert asked(studio, path, **headers)[0] == status
    if status == 403:
        assert asked(studio, "/qwen_edit_trainer/stop", "POST", **headers)[0] == 403


def test_reading_routes_take_no_post(run: dict[str, Any], studio: PackServer):
    assert asked(studio, f"{RUNS}/watched/graph", "POST")[0] == 405
