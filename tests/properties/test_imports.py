"""SimpleTuner's files with any value at any key, and any text or bytes in their place: a job or our own error."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.any_values import TEXTS, VALUES
from tests.support.imported import ROOT, mentioned, options
from tests.support.limits import result_or_own_error
from tests.support.quickstart import CONFIG, EDIT_V1, EDIT_V2, as_edit_v2
from trainer_core.config import JobConfig, from_json, to_json
from trainer_core.errors import ConfigError, TrainerError
from trainer_core.json_text import plain_json
from trainer_core.simpletuner.convert import Imported, convert, import_simpletuner
from trainer_core.simpletuner.keys import DATA_REASONS, TABLE_REASONS
from trainer_core.simpletuner.section import words

SETTINGS = {**json.loads(plain_json(as_edit_v2(CONFIG))), "learning_rate": 1e-4}
DATASETS = json.loads(plain_json(EDIT_V2))
OPTIONS = [*options(), "model_kwargs", "--learning_rate", "comment"]
DATA_KEYS = [
    *DATA_REASONS,
    *words(
        "id type dataset_type disabled instance_data_dir caption_strategy instance_prompt conditioning_data "
        "conditioning_type conditioning_image_embeds source_dataset_id resolution resolution_type crop "
        "crop_style crop_aspect minimum_image_size maximum_image_size target_downsample_size repeats "
        "probability disable_validation parquet csv_file csv_caption_column only_instance_prompt "
        "prepend_instance_prompt disable_multiline_split timestep_sampling_offset"
    ),
]
USUAL = st.sampled_from(
    [
        "",
        "0",
        "1",
        "true",
        "edit-v1",
        "prodigy",
        "cosine",
        "area",
        "square",
        "parquet",
        "~x/y",
        "[1",
        "{",
        "1024x768",
        "../a",
    ]
) | st.sampled_from([0, 1, -1, 0.5, 512, 1e9, True, False, None, ["my-reference-images-a"], [["a"]]])


def is_a_job(imported: Imported | TrainerError) -> bool:
    """Whether it was imported. The job can then be stored and read again, and no line is too long to read."""
    if isinstance(imported, TrainerError):
        assert isinstance(imported, ConfigError)
        return False
    assert from_json(JobConfig, json.loads(json.dumps(imported.values, allow_nan=False))) == imported.job
    json.dumps(to_json(imported.job), allow_nan=False)
    "\n".join(imported.report).encode()
    return True


@given(
    st.lists(st.tuples(st.sampled_from(OPTIONS), USUAL | VALUES), max_size=4),
    st.dictionaries(TEXTS, VALUES, max_size=1),
)
def test_any_value_at_any_option(changes: list[tuple[str, Any]], others: dict[str, Any]) -> None:
    settings = {**SETTINGS, **dict(changes), **others}
    imported = result_or_own_error(lambda: convert(settings, copy.deepcopy(DATASETS), root=ROOT))
    if is_a_job(imported):
        assert {key.lstrip("-") for key in dict(changes)} <= mentioned(imported)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from(DATA_KEYS), USUAL | VALUES), min_size=1, max_size=4))
def test_any_value_at_any_key_of_a_data_set(changes: list[tuple[int, str, Any]]) -> None:
    datasets = copy.deepcopy(DATASETS)
    for number, key, value in changes:
        datasets[number][key] = value
    is_a_job(result_or_own_error(lambda: convert(dict(SETTINGS), datasets, root=ROOT)))


COLUMNS = [*TABLE_REASONS, "path", "caption_column", "filename_column"]


@given(st.dictionaries(st.sampled_from(COLUMNS), USUAL | VALUES, max_size=3))
def test_any_value_in_a_table(table: dict[str, Any]) -> None:
    datasets = copy.deepcopy(DATASETS)
    datasets[0] |= {"caption_strategy": "parquet", "parquet": {"path": "captions.jsonl", **table}}
    is_a_job(result_or_own_error(lambda: convert(dict(SETTINGS), datasets, root=ROOT)))


@given(VALUES, VALUES)
def test_any_values_in_place_of_both_files(settings: Any, datasets: Any) -> None:
    is_a_job(result_or_own_error(lambda: convert(settings, datasets, root=ROOT)))
    is_a_job(result_or_own_error(lambda: convert(dict(SETTINGS), datasets, root=ROOT)))


def edited(text: str) -> st.SearchStrategy[bytes]:
    """The text with a part of it replaced by any bytes."""
    whole = text.encode()
    places = st.tuples(st.integers(0, len(whole)), st.integers(0, 40), st.binary(max_size=20) | TEXTS.map(_encoded))
    return places.map(lambda place: whole[: place[0]] + place[2] + whole[place[0] + place[1] :])


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


FILES = (
    st.binary()
    | TEXTS.map(_encoded)
    | st.sampled_from(
        [
            b"[" * 200_000,
            b'{"a":' * 50_000,
            b"9" * 100_000,
            b"\xff\xfe[\x00]\x00",
            b"/*" * 500_000,
            b'"' * 500_001,
            b" " * 2**21,
        ]
    )
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("imports")


@hypothesis.settings(max_examples=50)
@given(config=FILES | edited(CONFIG))
def test_any_file_in_place_of_the_configuration(folder: Path, config: bytes) -> None:
    (folder / "config.json").write_bytes(config)
    (folder / "data.json").write_text(EDIT_V1)
    is_a_job(result_or_own_error(lambda: import_simpletuner(folder / "config.json", folder / "data.json", root=ROOT)))
    is_a_job(result_or_own_error(lambda: import_simpletuner(folder / "config.json", root=folder)))


@given(data=FILES | edited(EDIT_V1))
def test_any_file_in_place_of_the_data(folder: Path, data: bytes) -> None:
    (folder / "quickstart.json").write_text(CONFIG)
    (folder / "data.json").write_bytes(data)
    is_a_job(
        result_or_own_error(lambda: import_simpletuner(folder / "quickstart.json", folder / "data.json", root=ROOT))
    )
