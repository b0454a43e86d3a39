"""Captions from a CSV, JSON Lines or Parquet table with a column of file names and a column of captions."""

from __future__ import annotations

import csv
import json
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ..config import DatasetConfig
from ..config.dataset import CAPTION_TABLES
from ..errors import DatasetError, MissingPackageError
from ..text import is_blank, shown
from .images import PICTURE_SUFFIXES, UNREAD_PICTURE_SUFFIXES

Row = Mapping[str, Any]


def table_path(config: DatasetConfig) -> Path | None:
    """Path of the caption table; None if the caption strategy uses no table."""
    if config.caption_strategy not in CAPTION_TABLES:
        return None
    return Path(config.target_dir) / Path(config.captions.caption_file).expanduser()


def read_caption_table(config: DatasetConfig) -> dict[str, tuple[str, ...]]:
    """Captions by key (path below target_dir without extension, Unicode NFC), in row order.

    Raises:
        DatasetError: the table or one of its columns is missing, or the table can't be read; names the row.
        MissingPackageError: the table is a Parquet file, and neither pyarrow nor pandas is installed.
    """
    path = table_path(config)
    if path is None:
        return {}
    if not path.is_file():
        raise DatasetError(f"{shown(path)}: there is no such file. Put the table there or correct caption_file.")
    found: dict[str, list[str]] = {}
    try:
        for number, row in enumerate(_READERS[config.caption_strategy](path), 1):
            name, captions = _named_captions(path, number, row, config)
            found.setdefault(name, []).extend(captions)
    except OSError as error:
        raise DatasetError(
            f"{shown(path)}: the table can't be read ({error.strerror}). Check its permissions and the disk."
        ) from error
    except UnicodeDecodeError as error:
        raise DatasetError(f"{shown(path)}: the table is not UTF-8 text. Save it as UTF-8.") from error
    return {name: tuple(captions) for name, captions in found.items()}


def key_of(name: str) -> str:
    """The key of the target that a file name in a table refers to. `./` and a picture extension are optional."""
    path = PurePosixPath(unicodedata.normalize("NFC", name.strip().replace("\\", "/")))
    if path.suffix.lower() in PICTURE_SUFFIXES | UNREAD_PICTURE_SUFFIXES:
        path = path.with_suffix("")
    return path.as_posix()


def _named_captions(path: Path, number: int, row: Row, config: DatasetConfig) -> tuple[str, list[str]]:
    values = []
    for setting in ("filename_column", "caption_column"):
        column = getattr(config.captions, setting)
        if column not in row:
            raise DatasetError(
                f"{shown(path)}, row {number}: there is no column {column!r}. Its columns are "
                f"{', '.join(shown(str(key)) for key in row) or 'none'}. Correct the table or {setting}."
            )
        values.append(row[column])
    name, cell = values
    if not isinstance(name, str) or not name.strip():
        raise DatasetError(f"{shown(path)}, row {number}: the file name must be text, got {name!r}.")
    return key_of(name), [text.strip() for text in _texts(path, number, cell) if not is_blank(text)]


def _texts(path: Path, number: int, cell: object) -> list[str]:
    """The captions in a cell: a text, a list of texts, or such a list as JSON text. An empty cell has none."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        try:
            cell = json.loads(cell)
        except ValueError:
            return [str(cell)]  # an ordinary caption that starts with a bracket
    texts = [] if cell is None else [cell] if isinstance(cell, str) else cell
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{shown(path)}, row {number}: the caption must be a text or a list of texts, got {cell!r}.")
    return texts


def _csv_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="(more columns than the first line names)")
        try:
            yield from reader
        except csv.Error as error:
            raise DatasetError(
                f"{shown(path)}, line {reader.line_num}: this is not valid CSV ({error}). Correct the line."
            ) from error


def _json_rows(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DatasetError(
                    f"{shown(path)}, line {number}: this is not valid JSON ({error}). Correct the line."
                ) from error
            if not isinstance(row, dict):
                raise DatasetError(f"{shown(path)}, line {number}: each line must be one JSON object.")
            yield row


def _parquet_rows(path: Path) -> Iterable[Row]:
    try:
        return _arrow_rows(path)
    except ModuleNotFoundError:
        raise MissingPackageError("pyarrow", "caption_strategy parquet") from None


def _arrow_rows(path: Path) -> Iterable[Row]:
    """Rows of a Parquet file, through pyarrow or else pandas, which also works with fastparquet."""
    try:
        from pyarrow import ArrowException, parquet  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        import pandas  # pyright: ignore[reportMissingImports]

        try:
            frame = pandas.read_parquet(path)
        except ImportError as error:
            raise ModuleNotFoundError(str(error)) from error
        return [{name: _plain(value) for name, value in row.items()} for row in frame.to_dict("records")]
    try:
        return parquet.read_table(path).to_pylist()
    except ArrowException as error:
        raise DatasetError(f"{shown(path)}: the Parquet file can't be read ({error}). Save it again.") from error


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


_READERS = {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}
csv.field_size_limit(min(sys.maxsize, 1_000_000))
