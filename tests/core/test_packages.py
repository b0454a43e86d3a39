"""Packages that other programs replaced are found before anything is computed, with the command that mends it."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from tools.comfyui import REPO
from trainer_core import __main__ as command_line
from trainer_core import packages
from trainer_core.config import ModelConfig, OptimizerConfig
from trainer_core.errors import PackageError
from trainer_core.packages import check_packages, conflicts, explained_imports, requirements
from trainer_core.precision.quantise import converter
from trainer_core.qwen_image.base_model import BaseModel
from trainer_core.training.optimizer import optimizer_builder

# Each thread starts before the library is there, one of them as another extension would.
AT_ONCE = """
import threading
from trainer_core.packages import explained_imports

def ours(number):
    start.wait()
    with explained_imports(("diffusers", "transformers", "peft")[number % 3]):
        if number % 3 == 0:
            from diffusers import AutoencoderKLQwenImage, QwenImageTransformer2DModel
        elif number % 3 == 1:
            from transformers import Qwen2_5_VLForConditionalGeneration
        else:
            from peft.tuners.lora.layer import Linear

def others(number):
    start.wait()
    import diffusers

start = threading.Barrier(10)
threads = [threading.Thread(target=ours if number else others, args=(number,)) for number in range(10)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
"""


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch):
    """Pretends that packages have other versions, or with "" that they are missing."""
    real_version, real_spec = metadata.version, importlib.util.find_spec

    def pretend(**versions: str) -> None:
        named = {name.replace("_", "-"): version for name, version in versions.items()}

        def version(package: str) -> str:
            if named.get(package) == "":
                raise metadata.PackageNotFoundError(package)
            return named.get(package) or real_version(package)

        monkeypatch.setattr(packages.metadata, "version", version)
        check_packages.cache_clear()
        missing = [name for name, found in named.items() if not found]
        monkeypatch.setattr(packages, "find_spec", lambda name: None if name in missing else real_spec(name))

    yield pretend
    check_packages.cache_clear()


def test_the_bounds_are_those_of_requirements_txt():
    """Each line of the file is one of the packages that are checked."""
    lines = (REPO / "requirements.txt").read_text().splitlines()
    names = [line.split(">=")[0] for line in lines if line and not line.startswith("#")]
    assert [each.name for each in requirements()] == names
    assert all(len(each.specifier) for each in requirements())
    check_packages()


def test_an_older_diffusers(installed, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Another extension installed diffusers 0.36. Every command and node starts with a BaseModel."""
    installed(diffusers="0.36.0")
    with pytest.raises(PackageError, match=r"diffusers>=0\.37\.0 is needed, but 0\.36\.0 is installed") as caught:
        BaseModel(ModelConfig())
    assert f'-m pip install -r "{REPO / "requirements.txt"}"' in str(caught.value)
    job = tmp_path / "job.json"
    folders = {"target_dir": "nowhere", "reference_dirs": ["nowhere"]}
    job.write_text(json.dumps({"model": {}, "dataset": folders, "run_dir": "run", "cache_dir": "cache"}))
    for command in ("check", "encode", "train", "plan"):
        caplog.clear()
        assert command_line.main([command, str(job)]) == command_line.EXIT_ERROR
        assert "0.36.0 is installed" in caplog.messages[-1]
        assert "nowhere" not in caplog.text  # nothing else was looked at before


@pytest.mark.parametrize(("name", "is_ours"), [("PIL", False), ("trainer_core.gone", True), (None, True)])
def test_a_python_without_the_packages(
    name: str | None, *, is_ours: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def command(_options: object, _observer: object) -> int:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(command_line, "_check", command)
    if is_ours:
        with pytest.raises(ModuleNotFoundError):
            command_line.main(["check", "job.json"])
        return
    assert command_line.main(["check", "job.json"]) == 1
    assert "The package PIL is not installed in" in caplog.text and str(packages.REQUIREMENTS) in caplog.text


def test_all_problems_at_once(installed):
    installed(diffusers="0.36.0", peft="", filelock="3.0")
    with pytest.raises(PackageError) as caught:
        check_packages()
    text = str(caught.value)
    assert "peft>=0.18.0 is needed, but it is not installed" in text
    assert "filelock>=3.12.0 is needed, but 3.0 is installed" in text
    assert "diffusers" in text


def test_newer_and_development_versions_are_fine(installed):
    installed(diffusers="0.43.0.dev0", peft="0.19.0rc1", matplotlib="4.0+local")
    check_packages()


@pytest.mark.parametrize(("package", "version"), [("bitsandbytes", "0.45.0"), ("lion-pytorch", "0.1")])
def test_optional_packages_matter_only_where_they_are_used(package: str, version: str, installed):
    installed(**{package.replace("-", "_"): version})
    check_packages()
    cpu = torch.device("cpu")
    uses = {
        "bitsandbytes": lambda: converter("nf4-bnb"),
        "lion-pytorch": lambda: optimizer_builder(OptimizerConfig(optimizer="lion"), cpu),
    }
    with pytest.raises(PackageError, match=f"{package}>=.* is needed, but {version} is installed"):
        uses[package]()


def test_an_import_that_fails_names_what_does_not_fit(installed, monkeypatch: pytest.MonkeyPatch):
    installed(huggingface_hub="0.36.0")
    needs = {"transformers": ["huggingface-hub<3.0,>=1.0", "numpy>=1; extra == 'dev'", "not a requirement ]"]}
    monkeypatch.setattr(packages.metadata, "requires", lambda name: needs.get(name))
    monkeypatch.setattr(packages, "_version", lambda name: "0.36.0" if "hub" in name else "1.0")
    assert conflicts()[0] == "transformers needs huggingface-hub<3.0,>=1.0, but 0.36.0 is installed"
    outer = RuntimeError("Failed to import diffusers.models.x (look up to see its traceback)")
    outer.__cause__ = RuntimeError("operator torchvision::nms does not exist\nmore")
    with pytest.raises(PackageError) as caught, explained_imports("diffusers"):
        raise outer
    text = str(caught.value)
    assert "diffusers can't be imported: operator torchvision::nms does not exist\n" in text
    assert "but 0.36.0 is installed" in text and "installed: torch 1.0, torchvision 1.0" in text


def test_threads_may_import_a_library_at_the_same_time():
    """What is told before the start and the training itself run in two threads of ComfyUI."""
    done = subprocess.run([sys.executable, "-c", AT_ONCE], capture_output=True, text=True, cwd=REPO, check=False)
    assert done.returncode == 0
    assert "Exception in thread" not in done.stderr, done.stderr
