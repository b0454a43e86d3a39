"""Presets contain valid settings, and the user's own settings override them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from tests.support.narrow import planned_size
from tools.comfyui import REPO
from trainer_core.__main__ import main
from trainer_core.config import EncodingConfig, JobConfig, from_json, to_json
from trainer_core.errors import ConfigError
from trainer_core.geometry import Size
from trainer_core.job import load_job
from trainer_core.planning.choose import budget_of, choose_memory
from trainer_core.planning.plan import GIB
from trainer_core.planning.workload import Workload, pair_size
from trainer_core.presets import encoding_preset, preset_for, preset_names, read_preset, training_preset, with_preset

JOB = {"dataset": {"target_dir": "a", "reference_dirs": ["b"]}, "cache_dir": "c", "run_dir": "r", "model": {}}
CARDS = (8, 12, 16, 24, 32, 48)
HOST = 24 * GIB  # free memory of a computer with 32 GB
EXAMPLES = ("qwen_image.edit-v1-lora", "qwen_image.edit-v2-lora")


@pytest.mark.parametrize("name", preset_names())
def test_settings_are_ours_and_documented(name: str) -> None:
    preset = read_preset(name)
    job = from_json(JobConfig, with_preset(JOB, name))
    training = to_json(training_preset(name))
    for section, values in preset["job"].items():
        if section not in ("model", "encoding"):
            said = values if isinstance(values, dict) else {}
            assert {key: training[section][key] for key in said} == said and training[section] == to_json(job)[section]
    presets = (REPO / "docs" / "reference.md").read_text(encoding="utf-8")
    assert f"| `{name}` | {preset['about']} |" in presets
    assert ("demo" in preset) == (name in EXAMPLES)


@pytest.mark.parametrize("gib", CARDS)
@pytest.mark.parametrize("prompt", [230, 1400])
def test_the_preset_of_a_card_fits_and_uses_it(gib: int, prompt: int) -> None:
    """With the full-size network and one reference, for the prompt tokens of edit-v2 and edit-v1.

    `choose_memory` returns only plans that fit with their margin.
    """
    job = from_json(JobConfig, with_preset(JOB, f"{gib}gb"))
    assert job.memory.memory == job.memory.compile_blocks == "auto" and job.model.quantize_via == "accelerator"
    side = Size(job.encoding.resolution, job.encoding.resolution)
    pair = pair_size(side, [side], prompt)
    network = planned_size({"num_layers": 60}, job.model, job.lora)
    budget = dataclasses.replace(budget_of(torch.device("cpu"), gib), host_bytes=HOST)
    plan = choose_memory(job.train_config("-"), network, Workload(train=pair, batch=1, validation=pair), budget)
    assert plan.device_peak_bytes > 2 / 3 * gib * GIB


@pytest.mark.parametrize(
    ("gib", "name"),
    [
        (None, "8gb"),  # no CUDA card
        (5.8, "8gb"),  # a card of 6 GB
        (7.6, "8gb"),
        (9.7, "8gb"),
        (11.6, "12gb"),
        (15.6, "16gb"),
        (19.6, "16gb"),
        (22.2, "24gb"),  # an A10G, with ECC
        (23.6, "24gb"),
        (31.4, "32gb"),
        (44.4, "48gb"),  # an L40S, with ECC
        (139.7, "48gb"),
    ],
)
def test_each_card_gets_the_largest_preset_that_it_holds(gib: float | None, name: str) -> None:
    assert preset_for(gib) == name


def test_the_encoding_part_of_a_preset() -> None:
    assert encoding_preset("demo") == EncodingConfig(resolution=128, match_target_res=True, num_eval_images=4)
    assert encoding_preset("quality") == EncodingConfig(resolution=1024, num_eval_images=4)


def test_presets_of_cards_are_listed_by_size() -> None:
    names = preset_names()
    assert names[: len(EXAMPLES)] == EXAMPLES
    assert names[len(EXAMPLES) :][: len(CARDS)] == tuple(f"{gib}gb" for gib in CARDS)


def test_the_file_wins_over_the_preset_and_a_change_over_both(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**JOB, "lora": {"lora_rank": 4}}))
    job = load_job(path, ["encoding.resolution=640"], preset="quality")
    assert (job.lora.lora_rank, job.lora.lora_targets, job.encoding.resolution) == (4, "attention-mlp", 640)
    assert job.max_train_steps == 3000


def test_what_is_not_there_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"no preset 'qualty'.*one of qwen_image.*Did you mean 'quality'"):
        read_preset("qualty")
    for card, hint in (
        ("25gb", "use '24gb'"),
        ("80 GB", "use '48gb'"),
        ("25", "use '24gb'"),
        ("6gb", "smallest preset is for cards with 8 GB"),
    ):
        with pytest.raises(ConfigError, match=hint):
            read_preset(card)
    assert main(["train", "--set", "seed=3", "run_dir=runs/a"]) == 1
    assert "To change a setting, write --set run_dir=runs/a." in caplog.text
    assert main(["train"]) == 1 and "no configuration" in caplog.text
    assert main(["train", "--example", "quality"]) == 1 and "needs a configuration" in caplog.text
    assert main(["check", str(tmp_path / "none.json"), "--example", "quality"]) == 1
