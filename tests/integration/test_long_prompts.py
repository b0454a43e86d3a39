"""Captions and prompts that are too long: refused before anything is encoded, by every command, in a short message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.support.jobs import make_job
from tests.support.narrow import picture
from trainer_core.config import ModelConfig
from trainer_core.data.graph_pairs import pair_pictures
from trainer_core.errors import ConfigError, DatasetError, TrainerError
from trainer_core.job import check_job, encode_job, load_job, plan_job
from trainer_core.pictures.contact_sheet import contact_sheet
from trainer_core.sample import SampleRequest, sample_edit
from trainer_core.settings import merged

WORDS = "red " * 1200  # 1,201 tokens: as many words, and the last space


@pytest.fixture
def job(model: ModelConfig, tmp_path: Path) -> dict[str, Any]:
    """A job of four pairs."""
    return make_job(tmp_path, model)


def refusals(folder: Path, values: dict[str, Any]) -> list[str]:
    """What `check`, `plan` and `encode` refuse the job with; "" if they accept it."""
    (folder / "job.json").write_text(json.dumps(values))
    found = []
    for command in (lambda job: check_job(job).raise_problems(), plan_job, encode_job):
        try:
            command(load_job(folder / "job.json"))
        except TrainerError as error:
            found.append(str(error))
        else:
            found.append("")
    return found


@pytest.mark.parametrize(
    "change",
    [
        {"encoding": {"validation_prompts": ["Turn it red.", WORDS]}},
        {"encoding": {"validation_negative_prompt": WORDS}},
        {"dataset": {"captions": {"caption_prefix": WORDS}}},
        {"dataset": {"caption_strategy": "instanceprompt", "instance_prompt": WORDS}},
    ],
)
def test_every_command_refuses_a_long_prompt_with_its_tokens(
    change: dict[str, Any], job: dict[str, Any], tmp_path: Path
):
    for found in refusals(tmp_path, merged(job, change)):
        assert "tokens; tokenizer_max_length allows 1,024. Shorten it." in found
        assert len(found) < 3_000
    assert not (tmp_path / "cache" / "latents").exists()


def test_the_limit_is_a_setting(job: dict[str, Any], tmp_path: Path):
    (tmp_path / "pairs" / "target" / "000.txt").write_text(WORDS)
    first = refusals(tmp_path, job)
    assert all("000: 'red red " in each and "has 1,200 tokens" in each for each in first), first
    assert refusals(tmp_path, merged(job, {"encoding": {"tokenizer_max_length": 1200}})) == ["", "", ""]


def test_a_caption_of_a_megabyte_is_refused_with_the_folder(job: dict[str, Any], tmp_path: Path):
    (tmp_path / "pairs" / "target" / "000.txt").write_text("x" * 995_000)
    for found in refusals(tmp_path, job):
        assert "000.png: a caption has 995,000 characters; at most 20,000 are allowed" in found
        assert len(found) < 2_000


@pytest.mark.parametrize(
    ("caption", "says"), [("a\ud800", "half a surrogate pair"), ("x" * 20_001, "20,001 characters")]
)
def test_captions_of_pictures_in_a_graph(caption: str, says: str, tmp_path: Path):
    pictures = [picture(0), picture(1)]
    with pytest.raises(DatasetError, match=f"Caption 1 .*{says}"):
        pair_pictures(pictures, [pictures], ["Turn it red.", caption], tmp_path / "pairs")
    assert not (tmp_path / "pairs").exists()


def test_the_longest_caption_is_drawn(tmp_path: Path):
    pictures = [picture(0)]
    for caption in ("x" * 20_000, "word " * 4_000, "变" * 20_000):
        dataset = pair_pictures(pictures, [pictures], [caption], tmp_path / "pairs")
        sheet = contact_sheet(dataset)
        assert max(sheet.size) < 4_000


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("red " * 4_200, "has 4,201 tokens; tokenizer_max_length allows 4,096"),
        ("x" * 1_000_000, "has 1,000,000 characters; at most 20,000 are allowed"),
        ("a\ud800", "half a surrogate pair"),
        (None, "must be text, got None"),
    ],
)
def test_prompts_of_a_sample(name: str, text: Any, says: str, model: ModelConfig):
    values = {"prompt": "Turn it red.", name: text}
    with pytest.raises(ConfigError, match=name) as caught:
        sample_edit(SampleRequest(model=model, references=(picture(0),), **values))
    assert says in str(caught.value) and len(str(caught.value)) < 1_000
