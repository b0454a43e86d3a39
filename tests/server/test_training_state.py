"""Training must leave process-wide state (such as random generators) unchanged, so other nodes sample the same."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.comfyui_server import PackServer
from tests.support.training_graph import (
    BASE,
    PLOT,
    TRAIN,
    Pressed,
    error_of,
    forget,
    helper,
    hidden,
    node,
    place_pairs,
    progress_of,
    training,
)

pytestmark = pytest.mark.server


def with_state(name: str, steps: int = 3, **options: Any) -> dict[str, Any]:
    """A prompt that records the process state before and after encoding and training."""
    prompt = training(["name", 0], steps, **options)
    del prompt[PLOT]  # ComfyUI would cache its large picture
    return {
        **prompt,
        "before": helper("GlobalState"),
        "name": hidden(name, after=["before", 0]),
        "after": helper("GlobalState", after=[TRAIN, 2]),
    }


@pytest.fixture(scope="module")
def warm(studio: PackServer) -> PackServer:
    """A server after one training: packages are imported, which may change process state, and the cache is filled."""
    studio.run(training("warm", 2))
    return studio


def test_state_in_one_prompt(warm: PackServer):
    place_pairs(warm, "for state", 3)
    outputs = warm.run(with_state("state", folder="for state", validate=2))
    (before,), (after,) = outputs["before"]["state"], outputs["after"]["state"]
    assert before["inference"]
    assert not before["grad"]
    assert before == after


def test_state_after_an_interruption(warm: PackServer):
    state = {"state": helper("GlobalState")}
    before = warm.run(state)
    Pressed(warm, training("broken off", 5000), progress_of(TRAIN, 3, 5000)).assert_interrupted_at(TRAIN)
    assert warm.run(state) == before


def test_state_after_an_error(warm: PackServer):
    state = {"state": helper("GlobalState")}
    warm.run(training("mine", 2))
    before = warm.run(state)
    error_of(warm.wait(warm.queue(training("mine", 2, seed=1))))
    assert warm.run(state) == before


def test_global_draws_of_other_nodes(warm: PackServer):
    alone = {"seed": helper("SeedGlobally", seed=7), "drawn": helper("DrawGlobally", after=["seed", 0])}
    place_pairs(warm, "for draws", 3)
    trained = training(["name", 0], 2, folder="for draws")
    del trained[PLOT]  # ComfyUI takes preview file names from Python's random generator
    between = {
        **trained,
        "seed": helper("SeedGlobally", seed=7),
        "name": hidden("draws", after=["seed", 0]),
        "drawn": helper("DrawGlobally", after=[TRAIN, 2]),
    }
    assert warm.run(between)["drawn"]["drawn"] == warm.run(alone)["drawn"]["drawn"]


def picture(server: PackServer, seed: int, also: dict[str, Any]) -> dict[str, Any]:
    """Digest of latents from ComfyUI's sampler with an empty cache, in one prompt with the nodes in `also`."""
    forget(server)
    prompt = {
        **also,
        "model": helper("NarrowModel", base=BASE, num_layers=2),
        "condition": helper("Condition", width=128, seed=1),
        "latent": helper("Latent"),
        "drawn": node(
            "KSampler",
            model=["model", 0],
            seed=seed,
            steps=3,
            cfg=1.0,
            sampler_name="euler_ancestral",
            scheduler="simple",
            positive=["condition", 0],
            negative=["condition", 0],
            latent_image=["latent", 0],
            denoise=1.0,
        ),
        "digest": helper("Digest", value=["drawn", 0]),
    }
    (digest,) = server.run(prompt)["digest"]["digest"]
    assert digest["extent"] > 0.1
    return digest


def test_another_workflow_samples_the_same(warm: PackServer):
    before = picture(warm, 5, {})
    place_pairs(warm, "for another", 3)
    during = picture(warm, 5, training("another", 3, folder="for another"))
    after = picture(warm, 5, {})
    assert before == during == after
    assert picture(warm, 6, {})["sha"] != before["sha"]
