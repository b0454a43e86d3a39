"""Paths in settings: backslashes of Windows, and escapes that JSON has read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer_core.errors import ConfigError, JobError
from trainer_core.job import load_job
from trainer_core.written_path import control_problem, written_path


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A job file whose folders exist, and a folder with a backslash in its name."""
    (tmp_path / "data" / "target").mkdir(parents=True)
    (tmp_path / "odd\\name").mkdir()
    return tmp_path / "job.json"


def write(job: Path, **changes: Any) -> Path:
    folders = {"target_dir": "data/target", "reference_dirs": ["data/reference"]}
    job.write_text(json.dumps({"model": {}, "dataset": folders, "cache_dir": "cache", "run_dir": "run", **changes}))
    return job


def test_a_backslash_separates_folders_unless_it_is_in_a_name(job: Path) -> None:
    root = job.parent
    assert written_path("data\\target", root) == root / "data" / "target"
    assert written_path("new\\run", root) == root / "new" / "run"
    assert written_path("odd\\name", root) == root / "odd\\name"
    assert written_path("x" * 300 + "\\y", root) == root / ("x" * 300) / "y"
    folders = {"target_dir": "data\\target", "reference_dirs": ["data\\reference"], "mask_dir": "data\\mask"}
    found = load_job(write(job, dataset=folders, run_dir="runs\\first", cache_dir="a\\cache"))
    assert found.dataset is not None
    assert found.dataset.target_dir == str(root / "data" / "target")
    assert found.dataset.reference_dirs == (str(root / "data" / "reference"),)
    assert found.dataset.mask_dir == str(root / "data" / "mask")
    assert (found.run_dir, found.cache_dir) == (str(root / "runs" / "first"), str(root / "a" / "cache"))


def test_an_unknown_user_is_named() -> None:
    with pytest.raises(ConfigError, match="~nosuchuser7/x: there is no user"):
        written_path("~nosuchuser7/x", Path())


def test_what_json_made_of_backslashes_is_shown_with_the_way_on(job: Path) -> None:
    text = write(job).read_text().replace('"data/target"', r'"C:\new\target"')
    job.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_job(job)
    assert str(caught.value) == (
        r'dataset.target_dir was read with \n as a line break and \t as a tab: "C:\new\target". '
        r'Write "C:\\new\\target" or "C:/new/target".'
    )


SETTINGS: dict[str, dict[str, Any]] = {
    "model.base": {"model": {"base": "a\nb"}},
    "model.transformer_file": {"model": {"transformer_file": "a\nb"}},
    "model.tokenizer": {"model": {"tokenizer": "a\nb"}},
    "model.quantised_cache_dir": {"model": {"quantised_cache_dir": "a\nb"}},
    "lora.init_lora": {"lora": {"init_lora": "a\nb"}},
    "cache_dir": {"cache_dir": "a\nb"},
    "run_dir": {"run_dir": "a\nb"},
    "dataset.mask_dir": {"dataset": {"target_dir": "t", "reference_dirs": ["r"], "mask_dir": "a\nb"}},
    "dataset.reference_dirs": {"dataset": {"target_dir": "t", "reference_dirs": ["a\nb"]}},
    "dataset.captions.caption_file": {
        "dataset": {"target_dir": "t", "reference_dirs": ["r"], "captions": {"caption_file": "a\nb"}}
    },
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_path_is_checked(setting: str, job: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_job(write(job, **SETTINGS[setting]))
    assert str(caught.value) == rf'{setting} was read with \n as a line break: "a\nb". Write "a\\nb" or "a/nb".'


def test_all_paths_are_checked_at_once(job: Path) -> None:
    with pytest.raises(JobError, match="There are 2 problems"):
        load_job(write(job, cache_dir="a\tb", run_dir="c\nd"))


def test_other_control_characters() -> None:
    assert control_problem("a\x01b") == "contains a control character (a\\x01b). Remove it"
    assert control_problem("a b/ü\\c") == ""


def test_a_change_with_quotes_and_single_backslashes_is_refused(job: Path) -> None:
    with pytest.raises(ConfigError, match=r"Invalid \\escape.* write \\\\ or /"):
        load_job(write(job), [r'run_dir="C:\data\run"'])
    assert load_job(write(job), [r"run_dir=runs\data\run"]).run_dir == str(job.parent / "runs" / "data" / "run")
