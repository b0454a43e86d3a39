"""nodes/host_*.py with the real ComfyUI: folders, long calls and loading LoRAs."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.comfy_subprocess import run_in_comfyui

pytestmark = pytest.mark.slow  # imports ComfyUI in a subprocess, without a server

NETWORKS = [
    ("diffusion_models", "edit/transformer", {"_class_name": "QwenImageTransformer2DModel"}),
    ("text_encoders", "Qwen2.5-VL-7B-Instruct", {"architectures": ["Qwen2_5_VLForConditionalGeneration"]}),
    ("vae", "saved/vae", {"_class_name": "AutoencoderKLQwenImage"}),
    ("vae", "another", {"_class_name": "AutoencoderKL"}),
    ("vae", "odd", ["AutoencoderKLQwenImage"]),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ComfyUI's folders for these tests, with a base model and a LoRA in a pickle format, which must not be listed."""
    base = tmp_path_factory.mktemp("host")
    for name in ("input", "output/loras", "named", "named_by_variable", "diffusers/Some-Model/transformer"):
        (base / name).mkdir(parents=True)
    (base / "diffusers/Some-Model/transformer/config.json").write_text("{}")
    (base / "diffusers/no_model").mkdir()
    for kind, name, config in NETWORKS:
        place = base / "models" / kind / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(json.dumps(config))
        (place / "model.safetensors").write_bytes(b"x")
    (base / "models/vae/without weights").mkdir()
    (base / "models/vae/without weights/config.json").write_text(json.dumps(NETWORKS[2][2]))
    (base / "output/loras/pickled.pt").write_bytes(b"x")
    return base


@pytest.fixture(scope="module")
def answers(folder: Path, comfyui_dir: Path, repo: Path) -> dict[str, Any]:
    """The results of tests/support/comfy_subprocess_host.py."""
    values = {"repo": str(repo), "folder": str(folder), "named": str(folder / "named")}
    roots = {"QWEN_EDIT_DATASET_ROOTS": os.pathsep.join(["relative", "", str(folder / "named_by_variable")])}
    work = folder / "work"
    return run_in_comfyui(comfyui_dir, "comfy_subprocess_host.py", work, {}, values, environment=roots).values


@pytest.mark.parametrize("file", ["good", "halved", "dora", "lokr"])
def test_a_good_file_passes(file: str, answers: dict[str, Any]):
    """`halved` has an alpha of half the rank, which ComfyUI and the check must both apply."""
    assert answers["check"][file] == "None"


def test_a_dora_of_columns_is_refused(answers: dict[str, Any]):
    assert "scales the columns of transformer_blocks" in answers["check"]["columns"]


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("raw names", "8 of the 8 keys in "),
        ("one wrong", "2 of the 8 keys in "),
        ("too shallow", "4 of the 8 keys in "),
    ],
)
def test_bad_files_are_refused(file: str, says: str, answers: dict[str, Any]):
    assert answers["check"][file].startswith("ExportError: ")
    assert says in answers["check"][file]


def test_apply_changes_weights_by_strength_times_up_times_down(answers: dict[str, Any]):
    found = answers["apply"]
    assert (found["applied"], found["number of patches"], found["base is untouched"]) == ("True", "4", "True")


def test_apply_fails_when_a_part_does_not_fit(answers: dict[str, Any]):
    assert "4 of the 8 keys in " in answers["apply"]["does not fit"]


def test_modes_in_a_long_call(answers: dict[str, Any]):
    found = answers["long"]
    assert found["inside"] == "(False, True)"
    assert found["as before"] == "True"
    assert found["as before after it"] == "True"


def test_wishes_in_a_long_call(answers: dict[str, Any]):
    found = answers["long"]
    assert found["listed"] == "['name']"
    assert [found[name] for name in ("no wish", "keep", "pause")] == ["NO", "KEEP", "PAUSE"]


def test_an_interruption_ends_as_comfyuis(answers: dict[str, Any]):
    assert answers["long"]["interrupted"] == "as ComfyUI's"
    assert answers["long"]["flag is cleared"] == "True"


def test_every_phase_has_a_bar_of_its_own(answers: dict[str, Any]):
    """Newer ComfyUI versions send nothing after a bar's value falls, until it exceeds the last value sent."""
    steps = [[[1, 9], [2, 9]], [[3, 9]]]
    drawing = [[[4, 4]], [[1, 9], [2, 9]]]
    assert answers["bars"] == [[[80, 80]], [[1, 41], [41, 41]], steps[0], drawing[0], steps[1], drawing[1]]


def test_a_file_is_placed_once_and_never_over_another(answers: dict[str, Any]):
    one, two = "mine/mine.safetensors", "mine/mine-2.safetensors"
    assert answers["placed"]["names"] == str([one, one, two, two])


def test_dataset_roots(answers: dict[str, Any], folder: Path):
    names = ("input", "output", "named", "named_by_variable")
    assert answers["folders"]["roots"] == str({name: str(folder / name) for name in names})


def test_listed_files(answers: dict[str, Any]):
    found = answers["folders"]
    assert "pickled.pt" not in found["lora names"]
    assert "mine.safetensors" in found["lora names"]
    assert found["secret"].startswith("ConfigError: ")
    assert found["base models"] == str(["Some-Model", "demo (embedded)"])


def test_listed_networks(answers: dict[str, Any], folder: Path):
    """Each list has files, and folders that contain a network of the list's kind."""
    found = answers["folders"]
    wanted: dict[str, list[str]] = {}
    for kind, name, _ in NETWORKS:
        wanted.setdefault(kind, []).append(f"{name}/model.safetensors")  # ComfyUI itself lists files
        wanted[kind] += [] if name in ("another", "odd") else [name]
    wanted = {kind: sorted(names) for kind, names in wanted.items()}
    assert found["networks"] == str(wanted)
    assert found["network"] == str(folder / "models/vae/saved/vae")
    assert found["no network"].startswith("ModelFileError: 'saved' is not in")


def test_reported_paths_hide_where_they_lie(answers: dict[str, Any], folder: Path):
    said = (
        f"input/my edit/a.png, 'named_by_variable', models/vae/x, {folder}/input2/b, my{folder}/input and output. End"
    )
    assert answers["folders"]["said"] == said
    assert answers["folders"]["inside"] == "a/x.png"
    assert answers["folders"]["outside"] == "x.png"


def test_what_was_found_before_a_stop_is_told(answers: dict[str, Any]):
    said = answers["refusals"]["stopped"]
    assert said.startswith("{'bad': ") and "The name of the edit can't be" in said


def test_only_trainings_that_are_refused_and_asked_for_are_looked_at(answers: dict[str, Any]):
    looked = answers["refusals"]
    assert (looked["None"], looked["['good']"], looked["['no such node']"]) == ("['bad']", "[]", "[]")
    assert looked["['try']"] == "['bad']"  # a page may ask only for a node behind the training


def test_a_fault_in_the_look_hides_nothing(answers: dict[str, Any]):
    assert "The name of the edit can't be" in answers["refusals"]["failed"]
    assert answers["failing"]["broken look"] == "It needs 2.1 GiB."


def test_what_another_node_also_says_is_told_once(answers: dict[str, Any]):
    said = ["There are 2 problems. Fix them and run again:", "1. It needs 2.1 GiB.", "2. C: No name."]
    assert answers["failing"]["others"].splitlines() == said


def test_each_problem_is_cut_for_the_page(answers: dict[str, Any]):
    lines = answers["failing"]["long"].splitlines()
    assert lines[1:3] == ["1. Wrong:", "  - 0"]
    assert lines[-2:] == ["… and 71 more lines.", "2. No name."]


def test_only_prompts_with_our_nodes_are_looked_at_and_notes_end_with_the_request(answers: dict[str, Any]):
    assert answers["queued"] == ["Ours_", "", "", "", "", ""]
