"""JSON from outside is parsed, or refused with the file, the line and the problem."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.support.limits import result_or_own_error
from trainer_core.errors import ConfigError, ModelFileError, RunFolderError
from trainer_core.job import load_job
from trainer_core.json_text import MAX_DEPTH, MAX_DIGITS, parse_json, plain_json, read_json
from trainer_core.qwen_image.folder import read_json as model_json
from trainer_core.qwen_image.sampling import load_scheduler
from trainer_core.settings import changed
from trainer_core.weights.source import open_weights

REFUSED: list[tuple[bytes, str]] = [
    (b'{\n"a": ' + b"[" * 100_000, "nested more than 100 levels deep in line 2"),
    (b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1), "nested more than 100 levels deep in line 1"),
    (b'{"a":\n "1",\n "b": ' + b"9" * 5000 + b"}", "a number has 5000 digits in line 3"),
    (b'{"a": "NaN",\n "b": NaN}', "NaN is not a number in JSON in line 2"),
    (b'{"a": -Infinity}', "-Infinity is not a number in JSON in line 1"),
    (b'{"a": [1,\n 1e999]}', "the number 1e999 is too large in line 2"),
    (b'{"a": [{"b": "x\\ud800"}]}', "a text under a.0.b contains half a surrogate pair (\\ud800)"),
    (b'{"a": {"\\udfff": 1}}', "a text under a contains half a surrogate pair (\\udfff)"),
    (b'{"a": "/pictures\\u0000/x"}', "a text under a contains a NUL character"),
    (b'{"a": 1,\n "b": 2,\n "a": 3}', "the name 'a' twice (lines 1 and 3). Keep one"),
    ('{"a": 1}'.encode("utf-16"), "is not UTF-8 text. Save it as UTF-8"),
    (b"\x89PNG\r\n\x1a\n\x00\x00", "is not UTF-8 text"),
    (b'{"a": "C:\\data\\x"}', "Invalid \\escape in line 1, column 10. In a text, write \\\\ or / in place of one \\"),
    (b'{"a": 1,\n}', "Remove the comma before the bracket."),
    (b'{"a": [1,\n ]}', "Remove the comma before the bracket."),
    (
        b'{"a": 1 // one\n}',
        "is not JSON: Expecting ',' delimiter in line 1, column 9. JSON has no comments. Remove them.",
    ),
    (b'{"a": }', "is not JSON: Expecting value in line 1, column 7."),
    (b"{'a': 1}", "in line 1, column 2. Texts have double quotes."),
    (b"", "is empty"),
    (b"\xef\xbb\xbf \n", "is empty"),
]


@pytest.mark.parametrize(("data", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_is_refused_and_in_which_line(tmp_path: Path, data: bytes, message: str):
    path = tmp_path / "job.json"
    path.write_bytes(data)
    for read in (lambda: read_json(path), lambda: load_job(path)):
        with pytest.raises(ConfigError) as caught:
            read()
        assert str(caught.value).startswith(f"{path} ") and message in str(caught.value)
        assert len(str(caught.value)) < 400 + len(str(path))
    with pytest.raises(RunFolderError, match=r"^run\.json "):
        read_json(path, "run.json", error=RunFolderError)


def test_what_is_parsed():
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    for text in (
        '{"a": [1, 2.5, -3e4, true, null, "\\u00e9 \\ud83d\\ude00 \\"//"], "b": {"a": 1}}',
        deep,
        "9" * MAX_DIGITS,
        "0",
    ):
        assert parse_json(text, "x") == parse_json(b"\xef\xbb\xbf" + text.encode(), "x") == json.loads(text)
    assert repr(parse_json("[NaN, -Infinity, 1e999]", "metrics", finite=False)) == "[nan, -inf, inf]"


def test_loose_json_keeps_its_line_numbers():
    text = '{"a": "http://x, ]", /* b\n */ "c": ["\\",]//", 1,], // d\n}'
    assert parse_json(text, "x", loose=True) == {"a": "http://x, ]", "c": ['",]//', 1]}
    assert plain_json(text).count("\n") == text.count("\n") and len(plain_json(text)) == len(text)
    with pytest.raises(ConfigError, match="in line 3, column 1"):
        parse_json('{ // a\n"b": /* c */ 1\n"d": 2}', "x", loose=True)


@pytest.mark.parametrize("piece", ['"\\', '\\"', "/*", "//", ",", ", ", "/* */", '"', "[", "{", '[],{"a":'])
def test_any_text_is_read_in_time_that_grows_with_its_length(piece: str):
    text = piece * (2**20 // len(piece))
    assert isinstance(result_or_own_error(lambda: parse_json(text, "x", loose=True)), ConfigError)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in folders, and other messages")
def test_what_is_no_file(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large.json").write_bytes(b"[" + b" " * 2**20 + b"]")
    expected: dict[Any, str] = {
        tmp_path: "is not a file",
        tmp_path / "pipe": "is not a file",
        tmp_path / "none.json": "No such file",
        tmp_path / ("x" * 300): "File name too long",
        tmp_path / "\ud800": "not a valid path",
        tmp_path / "a\0b": "not a valid path",
    }
    for path, message in expected.items():
        with pytest.raises(ConfigError, match=message) as caught:
            read_json(path)
        str(caught.value).encode()
    with pytest.raises(ConfigError, match="larger than 1 MiB"):
        read_json(tmp_path / "large.json", max_bytes=2**20)


def test_changes_take_what_is_no_json_as_text():
    for text in ("[" * 100_000, "9" * 5000, "NaN", "plain"):
        assert changed({}, [f"a={text}"]) == {"a": text}
    assert changed({}, ["a=[1, 2]"]) == {"a": [1, 2]}


@pytest.mark.parametrize(
    "data", [b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b"null", b"\xff", b'{"a": 1, "a": 2}', b""]
)
def test_the_json_of_a_model_folder_ends_in_our_own_error(tmp_path: Path, data: bytes):
    for name in ("config.json", "scheduler_config.json", "model.safetensors.index.json"):
        (tmp_path / name).write_bytes(data)
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    calls = (
        lambda: model_json(tmp_path / "config.json"),
        lambda: load_scheduler(tmp_path),
        lambda: open_weights(tmp_path),
    )
    for call in calls:
        found = result_or_own_error(call)
        assert isinstance(found, ModelFileError) and "Download it again" in str(found) and str(tmp_path) in str(found)


def test_a_schedule_of_another_kind(tmp_path: Path):
    path = tmp_path / "scheduler_config.json"
    for values, word in (({"base_shift": "0.5"}, "base_shift"), ({"use_dynamic_shifting": 1}, "use_dynamic_shifting")):
        path.write_text(json.dumps(values))
        with pytest.raises(ModelFileError, match=f"{word} in .* must be of the kind of"):
            load_scheduler(tmp_path)
    path.write_text(json.dumps({"base_shift": 1, "shift_terminal": None}))
    assert load_scheduler(tmp_path).config["base_shift"] == 1
