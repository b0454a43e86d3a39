"""Interrupting any phase must keep the work for the next run of the graph; stop-and-keep must save a LoRA at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    ENCODE,
    PAIR,
    PLOT,
    TRAIN,
    Pressed,
    assert_same_lora,
    cache_entries,
    changed,
    encoding,
    figures,
    forget,
    helper,
    node,
    ours,
    pairing,
    place_pairs,
    progress_of,
    run_dir,
    state_of,
    steps_written,
    training,
    under_way,
)
from tools.comfyui import status_of

pytestmark = pytest.mark.server

STEPS, MIDDLE, DRAW = 30, 15, 80


def test_pairing(studio: PackServer):
    count = 120
    place_pairs(studio, "many", count, sizes=((64, 64),))
    pressed = Pressed(studio, pairing("many"), progress_of(PAIR, 1))
    pressed.assert_interrupted_at(PAIR)
    assert max(data["value"] for data in pressed.progress) < 2 * count
    assert f"{count} pairs" in studio.run(pairing("many"))["preview"]["text"][0]


def test_encoding(studio: PackServer):
    """Interrupted once among pictures and once among prompts; existing cache entries are not made again."""
    count = 40
    place_pairs(studio, "some", count, sizes=((64, 64),))
    prompt = encoding("some", resolution=64)
    earlier = {kind: set(cache_entries(studio, kind)) for kind in ("latents", "prompt")}

    def made(kind: str) -> dict[Path, int]:
        return {path: time for path, time in cache_entries(studio, kind).items() if path not in earlier[kind]}

    Pressed(studio, prompt, progress_of(ENCODE, 2, 2 * count)).assert_interrupted_at(ENCODE)
    latents = made("latents")
    assert 2 <= len(latents) < 2 * count
    assert not made("prompt")

    # Interrupts at the first message: newer ComfyUI sends one per 0.1 s, so all may be done before the second.
    Pressed(studio, prompt, progress_of(ENCODE, 1, count + 1)).assert_interrupted_at(ENCODE)
    assert latents.items() <= made("latents").items()
    assert len(made("latents")) == 2 * count
    prompts = made("prompt")
    assert 1 <= len(prompts) < count + 1

    studio.run(prompt)
    assert prompts.items() <= made("prompt").items()
    assert len(made("prompt")) == count + 1


@pytest.fixture(scope="module")
def unbroken(studio: PackServer) -> Path:
    """Path of a LoRA trained without interruption."""
    return studio.output / figures(studio.run(training("unbroken", STEPS)))["lora_file"]


def test_training(unbroken: Path, studio: PackServer):
    """Interrupted while loading the model, between steps and while sampling; the final LoRA equals the unbroken one."""
    prompt = training("broken", STEPS, validate=MIDDLE, draw=DRAW)

    Pressed(studio, prompt, progress_of(TRAIN, 0)).assert_interrupted_at(TRAIN)
    assert under_way(studio) == []

    Pressed(studio, prompt, progress_of(TRAIN, 3, STEPS)).assert_interrupted_at(TRAIN)
    paused = state_of(studio, "broken")
    assert paused["state"] == "paused"
    assert 3 <= paused["steps"] <= MIDDLE
    checkpoint = run_dir(studio, "broken") / "checkpoints" / f"step-{paused['steps']:06d}"
    assert {path.name for path in checkpoint.iterdir()} == {"lora.safetensors", "optimizer.safetensors", "report.json"}
    assert steps_written(studio, "broken") == list(range(1, paused["steps"] + 1))

    drawing = Pressed(studio, prompt, progress_of(TRAIN, 2, 2 * DRAW))  # total: DRAW steps each for base and LoRA
    drawing.assert_interrupted_at(TRAIN)
    assert state_of(studio, "broken")["steps"] == MIDDLE
    assert not (run_dir(studio, "broken") / "samples" / f"step-{MIDDLE:06d}.png").exists()
    assert not list((studio.output / "loras" / "broken").glob("*"))

    outputs = studio.run(prompt)
    assert figures(outputs)["steps"] == STEPS
    assert steps_written(studio, "broken") == list(range(1, STEPS + 1))
    assert_same_lora(studio.output / figures(outputs)["lora_file"], unbroken)
    assert losses(studio, "broken") == losses(studio, "unbroken")


def losses(server: PackServer, name: str) -> list[float]:
    """Loss of every step."""
    lines = (run_dir(server, name) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def test_quantising(studio: PackServer):
    prompt = changed(training("quantised", 100), "load", base_model_precision="int8-quanto")
    Pressed(studio, prompt, progress_of(TRAIN, 1)).assert_interrupted_at(TRAIN)
    assert not list((studio.output / "loras" / "quantised").glob("*"))


def test_sampling(studio: PackServer):
    steps = 400
    prompt = {
        "load": training("unbroken")["load"],
        "picture": node("LoadImage", image="pairs/reference_1/000.png"),
        "sample": ours(
            "SampleEdit",
            model=["load", 0],
            reference_1=["picture", 0],
            prompt="a negative",
            negative_prompt=" ",
            lora_name="none",
            lora_strength=1.0,
            num_inference_steps=steps,
            guidance=4.0,
            seed=0,
            resolution=96,
            preprocessing="comfyui",
            match_target_res=True,
        ),
        "digest": helper("Digest", value=["sample", 0]),
    }
    pressed = Pressed(studio, prompt, progress_of("sample", 2, steps))
    pressed.assert_interrupted_at("sample")
    assert max(data["value"] for data in pressed.progress) < steps
    assert studio.run(changed(prompt, "sample", num_inference_steps=2))["digest"]["digest"][0]["finite"]


# Stop and keep


def stop(server: PackServer, name: str) -> dict[str, Any]:
    """Ask the server to stop and keep the run; returns its answer, and the run's entry in the list just before."""
    (listed,) = under_way(server)
    return {**listed, **server.post("/qwen_edit_trainer/stop", {"run_name": name})}


def kept(server: PackServer, prompt: dict[str, Any], when: int) -> tuple[Pressed, dict[str, Any]]:
    """Train, stop and keep the run at step `when`; returns how the prompt ended and the training node's figures."""
    asked = prompt[TRAIN]["inputs"]["max_train_steps"]
    pressed = Pressed(server, prompt, progress_of(TRAIN, when, asked), lambda: stop(server, "kept"))
    assert status_of(pressed.entry) == "execution_success", pressed.entry["status"]
    return pressed, figures(pressed.entry["outputs"])


def test_stop_and_keep(studio: PackServer):
    prompt = training("kept", 100_000)
    pressed, found = kept(studio, prompt, 3)
    assert pressed.answer["stopping"] == "kept"
    assert (pressed.answer["run_name"], pressed.answer["num_steps"]) == ("kept", 100_000)
    assert pressed.answer["step"] >= 3
    assert 3 <= found["steps"] < pressed.answer["step"] + 1000  # stopped soon, not at step 100 000
    assert found["stopped"] == "keep"
    assert (studio.output / found["lora_file"]).is_file()
    assert pressed.entry["outputs"][PLOT]["images"]  # nodes after the training still run
    assert state_of(studio, "kept")["state"] == "kept"
    assert under_way(studio) == []

    forget(studio)
    assert figures(studio.run(prompt)) == found  # a kept run counts as finished

    _, later = kept(studio, changed(prompt, TRAIN, if_run_exists="continue a kept run"), found["steps"] + 3)
    assert later["steps"] > found["steps"]
    assert steps_written(studio, "kept") == list(range(1, later["steps"] + 1))
    assert later["lora_file"] != found["lora_file"]  # nothing is overwritten
    assert (studio.output / found["lora_file"]).is_file()
