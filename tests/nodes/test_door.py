"""Every input of every node, given values of any type: our own error that names the input, or a fitting value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.comfy_subprocess import run_in_comfyui
from tests.support.hostile_values import HOSTILE

pytestmark = pytest.mark.slow  # imports ComfyUI in a subprocess, without a server


@pytest.fixture(scope="module")
def found(comfyui_dir: Path, repo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of tests/support/comfy_subprocess_door.py."""
    values = {"repo": str(repo), "hostile": str(repo / "tests" / "support" / "hostile_values.py")}
    work = tmp_path_factory.mktemp("door")
    return run_in_comfyui(comfyui_dir, "comfy_subprocess_door.py", work, {}, values).values


def faults(outcomes: dict[str, str]) -> dict[str, str]:
    return {name: each for name, each in outcomes.items() if each.startswith("FAULT")}


def test_every_node_has_the_door(found: dict[str, Any]) -> None:
    assert found["bases"] and all(found["bases"])


def test_every_own_socket_has_a_class(found: dict[str, Any]) -> None:
    assert len(found["classes"]) > 10
    assert all(found["classes"].values())


def test_no_value_is_a_fault(found: dict[str, Any]) -> None:
    assert len(found["door"]) > 150
    for key, outcomes in found["door"].items():
        assert faults(outcomes) == {}, key
    assert faults(found["executed"]) == {}
    assert faults(found["validated"]) == {}


def test_a_refusal_names_the_input_and_is_short(found: dict[str, Any]) -> None:
    for key, outcomes in found["door"].items():
        for name, each in outcomes.items():
            if each != "accepted":
                assert each.startswith("ConfigError: An input can't be used in "), (key, name)
                assert key.partition(".")[2] in each, (key, name)
                assert len(each) < 2_000, (key, name)


def test_what_is_never_right_is_never_accepted(found: dict[str, Any]) -> None:
    never = {"half a surrogate pair", "zero character", "long text", "NaN", "infinity", "5,000 digits", "65 bits"}
    never |= {
        "list",
        "long list",
        "deep list",
        "object of half a surrogate pair",
        "bytes",
        "no pictures",
        "flat tensor",
    }
    assert never - set(HOSTILE) == {"no pictures", "flat tensor"}
    for key, outcomes in found["door"].items():
        accepted = {name for name in never if outcomes[name] == "accepted"}
        assert accepted <= allowed_for(key), key


def allowed_for(key: str) -> set[str]:
    """Values that are right for an input after all."""
    others = {"ApplyLora.model", "EncodePairs.clip", "EncodePairs.vae", "EncodeImported.clip", "EncodeImported.vae"}
    others |= {"MoreSettings.clip"}
    if key == "PlotLoss.loss_map":
        return {"object of half a surrogate pair"}  # it has no losses, which the node says
    return {"no pictures", "flat tensor"} if key in others else set()


@pytest.mark.parametrize("name", ["text", "texts", "nothing", "nested", "NaN", "huge"])
def test_losses_of_another_pack(name: str, found: dict[str, Any]) -> None:
    assert found["losses"][name].startswith("ConfigError: loss_map must be {'loss': [numbers]}, got ")


def test_good_losses_are_plotted(found: dict[str, Any]) -> None:
    assert found["losses"]["good"] == "returned a result"


def test_an_optional_socket_may_get_nothing(found: dict[str, Any]) -> None:
    assert found["door"]["TrainLora.validation_encoded"]["null"] == "accepted"
    assert found["door"]["EncodePairs.clip"]["null"] == "accepted"
    assert "clip" in found["door"]["EncodePairs.clip"]["empty text"]


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("PairFolders.target_folder", "null", "target_folder must be text, got None."),
        ("CaptionSettings.caption_prefix", "object", "caption_prefix must be text, got {'a': 1}."),
        ("LoadModel.quantised_cache_gb", "empty list", "quantised_cache_gb must be a finite number, got []."),
        ("SizeSettings.megapixels", "NaN", "megapixels must be a finite number, got nan."),
        ("SizeSettings.megapixels", "1e308", "megapixels must be 0.01 to 17.0, got 1e+308."),
        ("PairImages.captions", "null", "captions must be text, got None."),
        ("TrainLora.seed", "65 bits", "seed must be a whole number of at most 64 bits, got 18446744073709551616."),
        ("TrainLora.seed", "minus one", "seed must be 0 to 4294967295, got -1."),
        ("TrainLora.model", "object", "model must be connected to an output QWEN_EDIT_MODEL, got {'a': 1}."),
        ("SampleEdit.reference_1", "flat tensor", "channels], got a tensor of the shape [3]."),
        ("EncodePairs.preprocessing", "null", "preprocessing must be text, got None."),
        (
            "EncodePairs.preprocessing",
            "line break",
            "preprocessing must be one of 'comfyui', 'diffusers', got 'a\\nb'.",
        ),
    ],
)
def test_what_is_said(key: str, value: str, says: str, found: dict[str, Any]) -> None:
    assert found["door"][key][value].endswith(says)


@pytest.mark.parametrize("place", ["first", "last"])
def test_a_list_that_lacks_a_picture_is_not_left_out(place: str, found: dict[str, Any]) -> None:
    assert found["half a list"][place].endswith(
        "reference_2 must be pictures [number, height, width, channels], got None."
    )


def test_true_and_false_of_older_graphs(found: dict[str, Any]) -> None:
    assert found["door"]["MemorySettings.compile_blocks"]["true"] == "accepted"
    assert found["executed"]["MemorySettings.compile_blocks: true"] == "returned a result"


def test_all_wrong_inputs_of_a_node_are_in_one_message(found: dict[str, Any]) -> None:
    assert found["wrong twice"] == (
        "ConfigError: 2 inputs can't be used in Sample With Qwen Edit LoRA:\n"
        "  - guidance must be a finite number, got '4'.\n"
        "  - seed must be a whole number, got None."
    )
