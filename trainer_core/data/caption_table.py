"""Captions from a CSV, JSON or Parquet table with a column of file names and a column of captions."""

from __future__ import annotations

import codecs
import csv
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

from ..config import DatasetConfig
from ..config.dataset import CAPTION_TABLES
from ..errors import DatasetError, MissingPackageError
from ..json_text import parse_json
from ..text import brief, is_blank, reason_of, shown
from ..written_path import written_path
from .images import PICTURE_SUFFIXES, UNREAD_PICTURE_SUFFIXES

Row = Mapping[str, Any]
CaptionTable: TypeAlias = dict[str, tuple[str, ...]]  # captions by the key of their target, in row order
_MAX_ROW_BYTES, _MAX_TABLE_BYTES = 1 << 20, 1 << 26  # of JSON; of the two columns of a Parquet file
_MAX_COLUMNS_SHOWN = 20
_JSON: dict[str, Any] = {"finite": False, "error": DatasetError}


def table_path(config: DatasetConfig) -> Path | None:
    """Path of the caption table; None if the caption strategy uses no table.

    Raises:
        ConfigError: the path begins with the home folder of an unknown user.
    """
    if config.caption_strategy not in CAPTION_TABLES:
        return None
    return written_path(config.captions.caption_file, Path(config.target_dir))


def read_caption_table(config: DatasetConfig) -> CaptionTable:
    """The captions of the table that the caption strategy uses; empty if it uses none.

    Raises:
        DatasetError: the table or one of its columns is missing, or the table can't be read; names the row.
        MissingPackageError: the table is a Parquet file, and neither pyarrow nor pandas is installed.
    """
    path = table_path(config)
    if path is None:
        return {}
    found: dict[str, list[str]] = {}
    try:
        if not path.is_file():
            raise DatasetError(f"{shown(path)}: there is no such file. Put the table there or correct caption_file.")
        for number, row in enumerate(_READERS[config.caption_strategy](path, config), 1):
            name, captions = _named_captions(path, number, row, config)
            found.setdefault(name, []).extend(captions)
    except OSError as error:
        raise DatasetError(
            f"{shown(path)}: the table can't be read ({reason_of(error)}). Check the file, its "
            "permissions and the disk."
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
    def cell_of(setting: str) -> object:
        column = getattr(config.captions, setting)
        if column not in row:
            raise DatasetError(
                f"{shown(path)}, row {number}: there is no column {brief(column)}. Its columns are "
                f"{', '.join(shown(str(key)) for key in list(row)[:_MAX_COLUMNS_SHOWN]) or 'none'}. Correct the table "
                f"or {setting}."
            )
        return row[column]

    name, cells = cell_of("filename_column"), [cell_of("caption_column")]
    if config.captions.fallback_caption_column:
        cells.append(cell_of("fallback_caption_column"))
    if not isinstance(name, str) or not name.strip():
        raise DatasetError(f"{shown(path)}, row {number}: the file name must be text, got {brief(name)}.")
    found = ([text.strip() for text in _texts(path, number, cell) if not is_blank(text)] for cell in cells)
    return key_of(name), next(filter(None, found), [])


def _texts(path: Path, number: int, cell: object) -> list[str]:
    """The captions in a cell: a text, a list of texts, or such a list as JSON text. An empty cell has none."""
    if isinstance(cell, str) and cell.lstrip().startswith("["):
        with suppress(DatasetError):  # then it is an ordinary caption that starts with a bracket
            cell = parse_json(cell, "", **_JSON)
    texts = [] if cell is None else [cell] if isinstance(cell, str) else cell
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise DatasetError(
            f"{shown(path)}, row {number}: the caption must be a text or a list of texts, got {brief(cell)}."
        )
    return texts


def _csv_rows(path: Path, _config: DatasetConfig) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, restkey="(more columns than the first line names)")
        try:
            yield from reader
        except csv.Error as error:
            raise DatasetError(
                f"{shown(path)}, line {reader.line_num}: this is not valid CSV ({error}). Correct the line."
            ) from error


def _json_rows(path: Path, _config: DatasetConfig) -> Iterator[Row]:
    """One JSON object per line, or a single JSON array of objects."""
    with path.open("rb") as file:
        begin = file.read(_MAX_ROW_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        file.seek(0)
        if begin.startswith(b"["):
            rows = parse_json(file.read(_MAX_TABLE_BYTES + 1), shown(path), max_bytes=_MAX_TABLE_BYTES, **_JSON)
            yield from (_object(path, f"row {number}", row) for number, row in enumerate(rows, 1))
            return
        for number, line in enumerate(iter(lambda: file.readline(_MAX_ROW_BYTES + 1), b""), 1):
            if line.removeprefix(codecs.BOM_UTF8).strip():
                name = f"{shown(path)}, line {number}"
                yield _object(path, f"line {number}", parse_json(line, name, max_bytes=_MAX_ROW_BYTES, **_JSON))


def _object(path: Path, place: str, row: object) -> Row:
    if not isinstance(row, dict):
        raise DatasetError(f"{shown(path)}, {place}: each row must be a JSON object, got {brief(row)}.")
    return row


def _parquet_rows(path: Path, config: DatasetConfig) -> Iterable[Row]:
    try:
        return _arrow_rows(path, config)
    except ModuleNotFoundError:
        raise MissingPackageError("pyarrow", "caption_strategy parquet") from None


def _arrow_rows(path: Path, config: DatasetConfig) -> Iterable[Row]:
    """The needed columns of a Parquet file, through pyarrow or else pandas, which also works with fastparquet."""
    captions = config.captions
    wanted = {captions.filename_column, captions.caption_column, captions.fallback_caption_column} - {""}
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
        file = parquet.ParquetFile(path)
        groups = (file.metadata.row_group(number) for number in range(file.metadata.num_row_groups))
        columns = [group.column(number) for group in groups for number in range(group.num_columns)]
        needed = [each for each in columns if each.path_in_schema.split(".")[0] in wanted]
        if sum(each.total_uncompressed_size for each in needed) > _MAX_TABLE_BYTES:
            raise DatasetError(
                f"{shown(path)}: its captions take more than {_MAX_TABLE_BYTES >> 20} MiB. Split the table."
            )
        if not wanted <= set(file.schema_arrow.names):
            return [dict.fromkeys(file.schema_arrow.names)]  # `_named_captions` says which column is missing
        return file.read(columns=list(wanted)).to_pylist()
    except ArrowException as error:
        raise DatasetError(
            f"{shown(path)}: the Parquet file can't be read ({shown(str(error))}). Save it again."
        ) from error


def _plain(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value


_READERS = {"csv": _csv_rows, "jsonl": _json_rows, "parquet": _parquet_rows}
csv.field_size_limit(min(sys.maxsize, 1_000_000))
