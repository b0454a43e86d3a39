"""Edit instructions: from a text file beside the target, from its name, from a table, or one for all."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from ..config import DatasetConfig
from ..config.dataset import CAPTION_TABLES
from ..errors import DatasetError
from .images import shown

MAX_CAPTION_FILE_BYTES = 1_000_000


def captions_of(
    target: Path, text_file: Path | None, config: DatasetConfig, listed: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The captions of a pair, at least one, with what the settings put before and behind them.

    `text_file` is the .txt of the target's name, None where there is none; `listed` is what the table says.

    Raises:
        DatasetError: one sentence that names the file and what to do.
    """
    settings = config.captions
    first = settings.caption_prefix
    if settings.prepend_instance_prompt and config.caption_strategy != "instanceprompt":
        first += config.instance_prompt.strip() + " "
    return tuple(first + each + settings.caption_suffix for each in _written(target, text_file, config, listed))


def _written(target: Path, text_file: Path | None, config: DatasetConfig, listed: tuple[str, ...]) -> tuple[str, ...]:
    if config.caption_strategy == "instanceprompt":
        return (config.instance_prompt.strip(),)
    if config.caption_strategy == "filename":
        return (_caption_from_name(target),)
    if config.caption_strategy in CAPTION_TABLES:
        if listed:
            return listed
        raise DatasetError(
            f"{shown(target)}: no caption in {shown(config.captions.caption_file)}. Add a row with its path below the "
            f"target folder in the column {config.captions.filename_column!r}."
        )
    if text_file is None:
        raise DatasetError(
            f"{shown(target)}: no caption; looked for {shown(target.with_suffix('.txt').name)} beside it. Write the "
            "edit instruction into that file, or choose caption_strategy filename or instanceprompt."
        )
    return read_caption_file(text_file, split=not config.captions.disable_multiline_split)


def read_caption_file(path: Path, *, split: bool = True) -> tuple[str, ...]:
    """Each line that isn't blank, without surrounding spaces; not `split`: the whole text as one caption.

    UTF-8, with or without a byte order mark.

    Raises:
        DatasetError: the file can't be read, is no UTF-8 text, is larger than 1 MB, or has only blank lines.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CAPTION_FILE_BYTES + 1)
    except OSError as error:
        raise DatasetError(f"{shown(path)}: the caption file can't be read ({error.strerror}).") from error
    if len(content) > MAX_CAPTION_FILE_BYTES:
        raise DatasetError(f"{shown(path)}: the caption file is larger than 1 MB; is it another kind of file?")
    text = _decoded(content, path).replace("\r\n", "\n").replace("\r", "\n")
    lines = (line.strip() for line in (text.split("\n") if split else [text]))
    captions = tuple(line for line in lines if line)
    if not captions:
        raise DatasetError(f"{shown(path)}: the caption file is empty. Write the edit instruction into it.")
    return captions


def _decoded(content: bytes, path: Path) -> str:
    text = None if b"\0" in content else _utf8(content)  # UTF-16 of plain English is full of zero bytes
    if text is None:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
        kind = " (it looks like UTF-16)" if utf16 else ""
        raise DatasetError(f"{shown(path)}: the caption file is not UTF-8 text{kind}. Save it as UTF-8.")
    return text


def _utf8(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _caption_from_name(target: Path) -> str:
    caption = unicodedata.normalize("NFC", target.stem.replace("_", " ")).strip()
    if not caption:
        raise DatasetError(f"{shown(target)}: its name holds no words for a caption. Rename it, or write a .txt file.")
    return caption
