"""Caption files, tables and folders with any content: the right captions or our own error."""

from __future__ import annotations

import csv
import functools
import io
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

from tests.support.limits import result_or_own_error
from trainer_core.config import CaptionConfig, DatasetConfig
from trainer_core.data.caption_table import key_of, read_caption_table
from trainer_core.data.captions import read_caption_file
from trainer_core.data.pairing import scan_folders
from trainer_core.draft_captions import caption_from
from trainer_core.errors import TrainerError
from trainer_core.qwen_image.writer import Answer

LETTERS = st.characters(
    categories=("L", "N", "P", "S", "Zs"), exclude_characters="[\u115f\u1160\u2800\u3164\uffa0"
)  # without blank letters
LINES = st.text(st.one_of(LETTERS, st.sampled_from("\r\n \t")), max_size=60)
NAMES = st.text(st.one_of(LETTERS, st.sampled_from("/\\. ")), max_size=20)
ROWS = st.lists(st.tuples(NAMES, LINES), max_size=6)
ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1", "cp1252", "shift-jis")
NUMBERS = st.one_of(st.integers(), st.floats(), st.just(10**4000))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=20), LINES),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=6,
)

DRAFT_PARTS = (
    "The edit:",
    "Caption: ",
    '"',
    "'",
    "“",
    "”",
    "**",
    "- ",
    "1. ",
    "\n",
    " ",
    "Make",
    "。",
    ".",
    "\ufffd",
    "\x00",
    "\u2028",
)


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def config(root: Path, strategy: str, file: str = "") -> DatasetConfig:
    return DatasetConfig(
        target_dir=str(root / "target"),
        reference_dirs=(str(root / "reference"),),
        caption_strategy=strategy,  # type: ignore[arg-type]
        captions=CaptionConfig(caption_file=file),
    )


def lines_of(text: str) -> tuple[str, ...]:
    """The lines with something in them, which are the captions of a text."""
    return tuple(line.strip() for line in re.split(r"\r\n|\r|\n", text) if line.strip())


@given(text=LINES, encoding=st.sampled_from(ENCODINGS))
def test_a_text_is_read_if_it_is_utf8(text: str, encoding: str) -> None:
    content = text.encode(encoding, errors="replace")
    with folder() as root:
        (root / "a.txt").write_bytes(content)
        found = result_or_own_error(functools.partial(read_caption_file, root / "a.txt"))
    try:
        wanted = lines_of(content.decode("utf-8-sig")) if b"\0" not in content else ()
    except UnicodeDecodeError:
        wanted = ()
    assert found == wanted if wanted else isinstance(found, TrainerError)


@given(content=st.binary(max_size=300))
def test_any_bytes_as_a_text(content: bytes) -> None:
    with folder() as root:
        (root / "a.txt").write_bytes(content)
        found = result_or_own_error(functools.partial(read_caption_file, root / "a.txt"))
    assert isinstance(found, TrainerError) or (found and all(map(str.strip, found)))


def as_csv(rows: list[tuple[Any, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([("filename", "caption"), *rows])
    return text.getvalue().encode("utf-8-sig")


def as_lines(rows: list[tuple[Any, Any]]) -> bytes:
    return "\n".join(json.dumps({"filename": name, "caption": caption}) for name, caption in rows).encode()


def as_array(rows: list[tuple[Any, Any]]) -> bytes:
    return json.dumps([{"filename": name, "caption": caption} for name, caption in rows], ensure_ascii=False).encode()


def as_parquet(rows: list[tuple[Any, Any]]) -> bytes:
    file = io.BytesIO()
    names, captions = ([row[number] for row in rows] for number in (0, 1))
    columns = {"filename": pyarrow.array(names, pyarrow.string()), "caption": pyarrow.array(captions, pyarrow.string())}
    parquet.write_table(pyarrow.table(columns), file)
    return file.getvalue()


FORMS = {"csv": as_csv, "jsonl": as_lines, "json": as_array, "parquet": as_parquet}


def table_of(content: bytes, form: str) -> Any:
    strategy = {"json": "jsonl"}.get(form, form)
    with folder() as root:
        (root / "target").mkdir()
        (root / "target" / "table").write_bytes(content)
        return result_or_own_error(lambda: read_caption_table(config(root, strategy, "table")))


@given(rows=ROWS)
def test_all_kinds_of_tables_give_the_same_captions(rows: list[tuple[str, str]]) -> None:
    wanted: dict[str, tuple[str, ...]] = {}
    for name, caption in rows:
        wanted.setdefault(key_of(name), ())
        wanted[key_of(name)] += (caption.strip(),) if caption.strip() else ()
    for form, written in FORMS.items():
        found = table_of(written(rows), form)
        assert isinstance(found, TrainerError) if not all(name.strip() for name, _ in rows) else found == wanted, form


@given(rows=st.lists(st.tuples(VALUES, VALUES), max_size=4), form=st.sampled_from(["jsonl", "json"]))
def test_any_values_in_a_row(rows: list[tuple[Any, Any]], form: str) -> None:
    found = table_of(FORMS[form](rows), form)
    assert isinstance(found, TrainerError) or all(isinstance(each, str) for texts in found.values() for each in texts)


SPOILED = [FORMS[form]([("a.png", "one"), ("b.png", "[two")]) for form in FORMS]


@given(
    content=st.one_of(st.binary(max_size=200), st.sampled_from(SPOILED), LINES.map(str.encode)),
    place=st.integers(0, 3000),
    byte=st.integers(0, 255),
    cut=st.integers(0, 3000),
    form=st.sampled_from(list(FORMS)),
)
def test_any_bytes_as_a_table(content: bytes, place: int, byte: int, cut: int, form: str) -> None:
    spoiled = bytearray(content)
    if place < len(spoiled):
        spoiled[place] = byte
    found = table_of(bytes(spoiled[: len(spoiled) - cut] if cut < len(spoiled) else spoiled), form)
    assert isinstance(found, TrainerError | dict)


@given(depth=st.integers(1, 100_000), form=st.sampled_from(["jsonl", "json"]), bracket=st.sampled_from("[{"))
@settings(max_examples=10)
def test_nested_brackets(depth: int, form: str, bracket: str) -> None:
    nested = {"[": "[" * depth, "{": '{"a":' * depth}[bracket]
    assert isinstance(table_of(f'{{"filename": "a", "caption": {nested}'.encode(), form), TrainerError)
    cell = table_of(as_csv([("a", nested)]), "csv")
    assert isinstance(cell, TrainerError) or cell == {"a": (nested,)}


PICTURE = io.BytesIO()
Image.new("RGB", (8, 8)).save(PICTURE, "PNG")
FILES = st.sets(
    st.builds(
        "{}{}{}".format,
        st.sampled_from(["a", "b", "A", "sub/a", "captions/a"]),
        st.sampled_from(["", "_0", "_1", "_start", "-End", "_start2", "-mask", ".png"]),
        st.sampled_from([".png", ".txt", ".caption", ".csv", ".json", ".md"]),
    ),
    max_size=9,
)


@given(
    target=FILES, reference=FILES, strategy=st.sampled_from(["textfile", "filename", "jsonl"]), optional=st.booleans()
)
@settings(max_examples=80, suppress_health_check=[HealthCheck.too_slow])
def test_every_target_is_used_or_there_is_a_problem(
    target: set[str], reference: set[str], strategy: str, optional: bool
) -> None:
    with folder() as root:
        for part, names in {"target": target, "reference": reference}.items():
            (root / part).mkdir()
            for name in names:
                path = root / part / name
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(PICTURE.getvalue() if name.endswith(".png") else b"make it so")
        table = {"filename": "target/a.png", "caption": "from the table"}
        (root / "target" / "rows.jsonl").write_text(json.dumps(table))
        settings_ = config(root, strategy, "rows.jsonl")
        made = DatasetConfig(
            target_dir=settings_.target_dir,
            reference_dirs=settings_.reference_dirs,
            caption_strategy=settings_.caption_strategy,
            captions=settings_.captions,
            references_optional=optional,
        )
        scan = result_or_own_error(lambda: scan_folders(made))
    assert not isinstance(scan, TrainerError)
    pictures = {name.removesuffix(".png") for name in target if name.endswith(".png")}
    assert {pair.key for pair in scan.dataset.pairs} == pictures or scan.problems
    assert all(pair.captions and all(pair.captions) for pair in scan.dataset.pairs)


@given(
    text=st.text(max_size=300) | st.lists(st.sampled_from(DRAFT_PARTS), max_size=12).map("".join), whole=st.booleans()
)
def test_an_answer_becomes_one_caption_or_a_reason(text: str, whole: bool):
    caption, why = caption_from(Answer(text, is_whole=whole))
    assert bool(caption) != bool(why)
    if caption:
        assert caption.isprintable() and caption == caption.strip()
        with folder() as place:
            (place / "draft.txt").write_bytes(f"{caption}\n".encode())
            assert read_caption_file(place / "draft.txt") == (caption,), "what is written is read as one caption"
