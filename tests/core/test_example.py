"""The job of an example: a preset with the demo model and the demo's pairs."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer_core import example as example_module
from trainer_core.errors import ConfigError
from trainer_core.example import example_job

TOKENIZER = Path("comfy", "text_encoders", "qwen25_tokenizer")


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Makes one small pair in place of the demo's pairs. Returns the list of folders in which it was made."""
    made: list[Path] = []

    def make(folder: Path) -> None:
        made.append(folder)
        for name in ("reference", "target"):
            (folder / name).mkdir(parents=True)
            Image.new("RGB", (32, 16), "orange").save(folder / name / "0.png")

    monkeypatch.setattr(example_module, "copy_demo_pairs", make)
    return made


def test_a_job_names_folders_below_the_given_one(few_pairs: list[Path], tmp_path: Path) -> None:
    changes = [f"model.tokenizer={tmp_path}", "max_train_steps=7"]
    job = example_job("qwen_image.edit-v2-lora", tmp_path, changes)
    assert (job.model.base, job.model.tokenizer, job.max_train_steps) == ("demo", str(tmp_path), 7)
    assert Path(job.run_dir).is_relative_to(tmp_path)
    assert job.dataset is not None
    references = [Path(each) for each in job.dataset.reference_dirs]
    assert len(references) == 3
    assert all((each / "0.png").is_file() and each.is_relative_to(tmp_path) for each in references)
    assert len({(each / "0.png").read_bytes() for each in references}) > 1, "the references must be different views"
    assert example_job("qwen_image.edit-v2-lora", tmp_path, changes) == job
    assert few_pairs == [tmp_path / "example"], "existing pairs must be reused"


def test_a_tokenizer_is_found_in_a_comfyui_around_the_folder(
    few_pairs: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_module, "__file__", str(tmp_path / "pack" / "trainer_core" / "example.py"))
    job_folder = tmp_path / "work" / "job"
    with pytest.raises(ConfigError, match=r"model\.tokenizer"):
        example_job("qwen_image.edit-v1-lora", job_folder)
    assert few_pairs == [], "it must be refused before pairs are made"
    (tmp_path / "work" / "ComfyUI" / TOKENIZER).mkdir(parents=True)
    job = example_job("qwen_image.edit-v1-lora", job_folder)
    assert job.model.tokenizer == str(tmp_path / "work" / "ComfyUI" / TOKENIZER)


@pytest.mark.parametrize(("name", "words"), [("16gb", r"16gb.*edit-v1"), ("edit-v1", "edit-v1-lora")])
def test_a_preset_that_is_no_example_is_refused_with_those_that_are(name: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        example_job(name, tmp_path)
    assert list(tmp_path.iterdir()) == []
