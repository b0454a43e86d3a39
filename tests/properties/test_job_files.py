"""Job files with any value at any key, and with any text or bytes: a valid job or our own error, never a traceback."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.any_values import TEXTS, VALUES
from tests.support.hostile_values import HOSTILE
from tests.support.limits import result_or_own_error
from tools.settings_reference import job_schema
from trainer_core.config import JobConfig, digest, from_json, to_json
from trainer_core.errors import ConfigError, TrainerError
from trainer_core.job import load_job

JOB: dict[str, Any] = {
    "model": {"base": "demo"},
    "dataset": {"target_dir": "after", "reference_dirs": ["before"]},
    "cache_dir": "cache",
    "run_dir": "run",
}
PART = {"id": "a", "dataset": JOB["dataset"]}


def keys_of(schema: dict[str, Any], path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """The path of every key in the schema of a job file."""
    found: list[tuple[str, ...]] = []
    for name, below in schema.get("properties", {}).items():
        found.append((*path, name))
        found += keys_of(below, (*path, name))
        found += keys_of(below.get("items", {}), (*path, name, "0"))
    return found


KEYS = keys_of(job_schema())


def with_value(job: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    """A copy of the job with this value at the path. Objects on the way are made; `0` is the first dataset."""
    job = copy.deepcopy(job)
    place: Any = job
    for part in path[:-1]:
        if part == "0":
            continue
        below = place.get(part)
        if part == "datasets":
            if not (isinstance(below, list) and below and isinstance(below[0], dict)):
                place[part] = below = [copy.deepcopy(PART)]
            place = below[0]
        else:
            place[part] = place = below if isinstance(below, dict) else {}
    place[path[-1]] = value
    return job


def is_storable(job: JobConfig) -> None:
    """A job that was accepted can be stored and read again."""
    values = to_json(job)
    digest(values)
    assert from_json(JobConfig, json.loads(json.dumps(values, allow_nan=False))) == job


@given(st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=4))
def test_any_value_at_any_key(changes: list[tuple[tuple[str, ...], Any]]) -> None:
    job = copy.deepcopy(JOB)
    for path, value in changes:
        job = with_value(job, path, value)
    made = result_or_own_error(lambda: from_json(JobConfig, job))
    if isinstance(made, TrainerError):
        assert isinstance(made, ConfigError)
    else:
        is_storable(made)


@pytest.mark.parametrize("name", HOSTILE)
def test_each_hostile_value_at_every_key(name: str) -> None:
    for path in KEYS:
        made = result_or_own_error(lambda path=path: from_json(JobConfig, with_value(JOB, path, HOSTILE[name])))
        if isinstance(made, JobConfig):
            is_storable(made)


def written(folder: Path, content: bytes) -> Path:
    path = folder / "job.json"
    path.write_bytes(content)
    return path


BYTES = st.binary() | st.text().map(str.encode) | st.from_regex(r"[\[{\]}\",:0-9 ]*").map(str.encode)
CHANGES = st.lists(
    st.builds("{}={}".format, st.sampled_from([".".join(key) for key in KEYS]) | TEXTS, TEXTS), max_size=3
)


@given(content=BYTES, changes=CHANGES)
def test_any_bytes_are_a_job_or_our_own_error(
    content: bytes, changes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = written(tmp_path_factory.mktemp("job"), content)
    result_or_own_error(lambda: load_job(path, changes))


@given(values=st.tuples(st.sampled_from(KEYS), VALUES), changes=CHANGES)
def test_a_file_with_any_value_and_any_changes(
    values: tuple[tuple[str, ...], Any], changes: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    try:
        content = json.dumps(with_value(JOB, *values)).encode()
    except (TypeError, ValueError):  # bytes, and numbers of more digits than Python writes
        return
    path = written(tmp_path_factory.mktemp("job"), content)
    made = result_or_own_error(lambda: load_job(path, changes))
    if isinstance(made, JobConfig):
        is_storable(made)
