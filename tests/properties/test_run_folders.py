"""Run folders whose files hold anything: a run that opens or our own error, and a list that always shows all runs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from tests.support.hostile_values import HOSTILE
from tests.support.limits import result_or_own_error
from trainer_core.config import TrainConfig, resume_key
from trainer_core.errors import TrainerError
from trainer_core.runs import view
from trainer_core.runs.folder import RunFolder
from trainer_core.runs.result import find_result, recorded_samples

CONFIG = TrainConfig(run_dir="run", encoded="pairs.json", max_train_steps=4)
KEY = resume_key(CONFIG)
STATE: dict[str, Any] = {
    "key": KEY,
    "state": "finished",
    "steps": 4,
    "saved": 4,
    "validated": 4,
    "result": {"lora_file": "run.safetensors", "steps": 4, "kept": False, "export": {}},
    "samples": {
        "step": 4,
        "grid_file": "step-000004.png",
        "psnr_base": 1.0,
        "psnr_lora": 2.0,
        "psnr_vae": 3.0,
        "unmeasured": "",
    },
}
ROW = {"step": 4, "num_steps": 4, "loss": 0.5, "learning_rate": 1e-4, "seconds": 1.0, "loss_by_sigma": {"0.1": 0.5}}
PATHS = [
    *((name,) for name in STATE),
    *(("result", name) for name in STATE["result"]),
    *(("samples", name) for name in STATE["samples"]),
    *(("key", name) for name in KEY),
]

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
hostile = anything | st.sampled_from(
    [value for name, value in HOSTILE.items() if name not in ("bytes", "5,000 digits")]
)


def changed(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    values = json.loads(json.dumps(values))
    place = values
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    return values


def check(state: bytes, metrics: bytes, name: str = "run.json") -> None:
    """Uses a folder with these files in every way. Nothing but a TrainerError may come out."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "run")
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps(STATE))
        (folder / "metrics.jsonl").write_bytes(metrics)
        (folder / name).write_bytes(state)
        listed = view.run_folders(Path(place), 5)
        shown = [view.summary(folder), view.curve(folder, 5), view.read_config(folder), view.samples(folder)]
        json.dumps(shown, allow_nan=False).encode()
        assert [each.name for each in listed] == ["run"]
        run = RunFolder(folder)
        found = result_or_own_error(run.state)
        is_damaged = isinstance(found, TrainerError)
        assert (shown[0]["state"] == "damaged") == is_damaged == bool(shown[0]["problem"])
        rows = result_or_own_error(run.metrics)
        assert isinstance(rows, list) and all(row["step"] >= 0 and row["loss"] is not None for row in rows)

        def use() -> None:
            find_result(CONFIG)
            if samples := recorded_samples(run):
                samples.as_text()
            sum(each.get("seconds") or 0.0 for each in rows)
            with RunFolder.open(folder, KEY) as opened:
                opened.lost_steps()

        result_or_own_error(use)


@given(path=st.sampled_from(PATHS), value=hostile)
def test_any_value_at_any_key_of_run_json(path: tuple[str, ...], value: Any) -> None:
    check(json.dumps(changed(STATE, path, value)).encode(), json.dumps(ROW).encode())


@given(path=st.sampled_from([(name,) for name in ROW]), value=hostile)
def test_any_value_at_any_key_of_a_row(path: tuple[str, ...], value: Any) -> None:
    row = json.dumps(changed(ROW, path, value)).encode()
    check(json.dumps(STATE).encode(), b"\n".join([json.dumps(ROW).encode(), row, json.dumps(ROW).encode()]))


@given(
    name=st.sampled_from(["run.json", "config.json", "graph.json", "dataset.json"]),
    data=st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()),
    metrics=st.binary(max_size=200),
)
def test_any_bytes_in_any_file(name: str, data: bytes, metrics: bytes) -> None:
    check(data, metrics, name)


@given(place=st.integers(0, len(json.dumps(STATE)) - 1), bit=st.integers(0, 7))
def test_any_flipped_bit_of_run_json(place: int, bit: int) -> None:
    data = bytearray(json.dumps(STATE).encode())
    data[place] ^= 1 << bit
    check(bytes(data), json.dumps(ROW).encode())
