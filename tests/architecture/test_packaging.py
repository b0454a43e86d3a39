"""Metadata for ComfyUI-Manager and the Comfy Registry, and the files of an installation."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from tests.support.source_files import absolute_imports, python_files
from tools.comfyui import REPO, install_pack

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BROUGHT_BY_COMFYUI = {
    "torch", "torchvision", "torchaudio", "torchsde", "numpy", "einops", "transformers", "tokenizers", "sentencepiece",
    "safetensors", "aiohttp", "yarl", "pyyaml", "pillow", "scipy", "tqdm", "psutil", "av",
}  # fmt: skip


@pytest.fixture(scope="module")
def pyproject() -> dict:
    return tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))


def requirements() -> list[str]:
    lines = (REPO / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return [line.split("#")[0].strip() for line in lines if line.split("#")[0].strip()]


def test_requirements_are_lower_bounds_on_what_comfyui_lacks():
    assert len(requirements()) >= 5
    for line in requirements():
        match = re.fullmatch(r"([A-Za-z0-9_.-]+)>=[\d.]+(?:\s*;.+)?", line)
        assert match, line
        assert match[1].lower() not in BROUGHT_BY_COMFYUI


def test_what_shipped_code_imports_is_asked_for(pyproject: dict):
    """Each third-party import of shipped code comes with ComfyUI, is a requirement, or is listed here with a reason."""
    names = {re.split(r"[>=;\s]", line)[0].lower().replace("-", "_") for line in requirements()}
    known = names | {name.replace("-", "_") for name in BROUGHT_BY_COMFYUI} | {"pil", "yaml", "optimum"}
    known |= {"packaging"}  # peft and transformers need it
    known |= {"gguf"}  # optional: without it, a .gguf file is refused with an error that names the package
    known |= {"comfy", "comfy_api", "comfy_execution", "comfyui_version", "folder_paths", "server"}  # ComfyUI itself
    known |= {"triton"}  # optional, for speed: what needs it says how to install it
    known |= {"pyarrow", "pandas"}  # optional, for captions in Parquet files: the error says how to install it
    shipped = python_files("nodes", "trainer_core")
    found = {top: path for path in shipped for top in absolute_imports(path)}
    foreign = {n: str(p) for n, p in found.items() if n not in sys.stdlib_module_names and n.lower() not in known}
    assert foreign == {}
    assert {"torch", "diffusers", "peft"} <= set(found)
    assert pyproject["project"]["dynamic"] == ["dependencies"]


def test_registry_metadata(pyproject: dict):
    project, comfy = pyproject["project"], pyproject["tool"]["comfy"]
    assert re.fullmatch(r"[a-z0-9-]{1,99}", project["name"])
    assert "comfyui" not in project["name"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", project["version"])
    assert {"PublisherId", "DisplayName", "requires-comfyui"} <= set(comfy)
    assert "web" not in comfy  # WEB_DIRECTORY is used instead; with both, each script would load twice
    assert project["version"] in (REPO / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "Version 2.0, January 2004" in (REPO / "LICENSE").read_text(encoding="utf-8")


def test_an_installation_has_what_it_needs_and_no_more(tmp_path: Path):
    pack = install_pack(tmp_path)
    have = {path.relative_to(pack).as_posix() for path in pack.rglob("*") if path.is_file()}
    needed = {
        "__init__.py",
        "LICENSE",
        "requirements.txt",
        "pyproject.toml",
        "nodes/host_call.py",
        "trainer_core/run.py",
        "trainer_core/demo/pairs/LICENCES.md",
        "trainer_core/demo/pairs/reference/00_chelsea.png",
    }
    needed |= {"web/qwen_edit_trainer.js", "web/trainer/trainer.css"}
    assert needed <= have
    assert {name for name in have if "/" not in name} <= {
        "__init__.py",
        "CHANGELOG.md",
        "LICENSE",
        "README.md",
        "SECURITY.md",
        "pyproject.toml",
        "requirements.txt",
    }
    top = {name.split("/")[0] for name in have}
    assert top & {"tests", "tools", "benchmarks", ".git", ".venv", ".comfyui", ".demo"} == set()
    assert not any("__pycache__" in name for name in have)
    assert {name.split("/")[0] for name in have if name.endswith(".py")} == {"__init__.py", "nodes", "trainer_core"}
    assert sum((pack / name).stat().st_size for name in have) < 40e6


def test_hooks_and_make_lint_run_the_same_ruff():
    pins = (REPO / "requirements-lint.txt").read_text(encoding="utf-8")
    hooks = (REPO / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==[\d.]+", hooks)) == set(re.findall(r"ruff==[\d.]+", pins)) != set()


def test_ci_tests_the_oldest_comfyui_that_the_pack_claims(pyproject: dict):
    oldest = pyproject["tool"]["comfy"]["requires-comfyui"].removeprefix(">=")
    assert f"v{oldest}" in (REPO / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
