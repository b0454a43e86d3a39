"""The preset follows from the card, and what overrides it is listed with the node that has set it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.comfy_subprocess import run_in_comfyui

pytestmark = pytest.mark.slow  # imports ComfyUI in a subprocess, without a server


@pytest.fixture(scope="module")
def found(comfyui_dir: Path, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of tests/support/comfy_subprocess_composed.py."""
    values = {"repo": str(repo), "cards": [None, 7.6, 15.6, 23.6, 47.4]}
    return run_in_comfyui(comfyui_dir, "comfy_subprocess_composed.py", tmp_path_factory.mktemp("w"), {}, values).values


@pytest.mark.parametrize(
    ("card", "preset", "precision", "rank", "resolution"),
    [
        ("None", "8gb", ["none", "bf16"], 16, 512),
        ("7.6", "8gb", ["nf4-bnb", "bf16"], 16, 512),
        ("15.6", "16gb", ["int8-quanto", "bf16"], 16, 768),
        ("23.6", "24gb", ["int8-quanto", "bf16"], 16, 1024),
        ("47.4", "48gb", ["none", "bf16"], 32, 1024),
    ],
)
def test_the_card_decides(
    card: str, preset: str, precision: list[str], rank: int, resolution: int, found: dict[str, Any]
) -> None:
    each = found["cards"][card]
    assert (each["preset"], each["precision"]) == (preset, precision)
    assert (each["rank"], each["resolution"], each["steps"]) == (rank, resolution, 2000)
    assert each["overridden"] == []


def test_why_it_is_this_preset(found: dict[str, Any]) -> None:
    assert found["cards"]["23.6"]["why"] == "Preset 24gb, because the card has 24 GB."
    assert found["cards"]["None"]["why"] == "Preset 8gb, the smallest, because this computer has no CUDA card."
    assert found["others"]["demo"]["why"] == "Preset demo, because the model is the demo model."
    assert found["others"]["quality"]["why"] == "Preset quality, as chosen."
    assert found["others"]["planned for 8"]["preset"] == "8gb"
    assert found["others"]["planned for 8"]["precision"] == ["nf4-bnb", "bf16"]


def test_what_overrides_the_preset(found: dict[str, Any]) -> None:
    each = found["others"]["overridden"]
    assert set(each["overridden"]) == {
        "resolution is 512, set by Qwen Edit More Settings. The preset has 1024.",
        "max_train_steps is 10, set by Train Qwen Edit LoRA. The preset has 2000.",
        "lora_rank is 4, set by Qwen Edit LoRA Settings. The preset has 16.",
        "lora_targets is 'image-attention', set by Qwen Edit LoRA Settings. The preset has 'attention-mlp'.",
    }
    assert each["held"]["model.base_model_precision"] == "int8-quanto"
    assert "lora.lora_rank" not in each["held"]
    assert found["others"]["chosen precision"]["overridden"] == [
        "base_model_precision is 'none', set by Qwen Edit Model. The preset has 'int8-quanto'."
    ]


def test_a_short_run_shortens_the_presets_warm_up(found: dict[str, Any]) -> None:
    each = found["others"]["quality"]
    assert (each["steps"], each["warmup"]) == (50, 5)
    assert (
        "lr_warmup_steps is 5, set by max_train_steps of Train Qwen Edit LoRA. The preset has 100."
        in each["overridden"]
    )


def test_pixel_differences_are_encoded_if_the_training_needs_them(found: dict[str, Any]) -> None:
    assert found["others"]["pixels"]["encodes_difference"]
    assert not found["others"]["overridden"]["encodes_difference"]


def test_the_nodes_are_called_so(found: dict[str, Any]) -> None:
    assert set(found["by"].values()) == set(found["names"])
