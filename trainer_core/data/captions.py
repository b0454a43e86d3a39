"""Captions (edit instructions): from a text file next to the target, its file name, a table, or one for all pairs."""

from __future__ import annotations

import codecs
import unicodedata
from pathlib import Path

from ..config import DatasetConfig
from ..config.dataset import CAPTION_TABLES
from ..errors import DatasetError
from ..text import beginning, is_blank, shown, text_problem
from .caption_edits import edited

MAX_CAPTION_FILE_BYTES = 1_000_000


def captions_of(
    target: Path, text_file: Path | None, config: DatasetConfig, listed: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """The captions of a pair, at least one, with their variants and the configured prefix and suffix.

    `text_file` is the target's .txt file, or None if it has none; `listed` holds the captions from the table.

    Raises:
        DatasetError: there is no usable caption; names the file and what to do.
    """
    settings = config.captions
    first = settings.caption_prefix
    if settings.prepend_instance_prompt and config.caption_strategy != "instanceprompt":
        first += config.instance_prompt.strip() + " "
    written = _written(target, text_file, config, listed)
    _check(written, target)
    written = edited(written, settings)
    if not written:
        raise DatasetError(f"{shown(target)}: caption_filter_list takes out the whole caption. Change one of them.")
    captions = tuple(first + each + settings.caption_suffix for each in written)
    _check(captions, target)
    return captions


def _check(captions: tuple[str, ...], target: Path) -> None:
    for caption in captions:
        if problem := text_problem(caption):
            raise DatasetError(f"{shown(target)}: a caption {problem}: {beginning(caption)}. Correct it.")


def _written(target: Path, text_file: Path | None, config: DatasetConfig, listed: tuple[str, ...]) -> tuple[str, ...]:
    if config.caption_strategy == "instanceprompt":
        return tuple(each.strip() for each in (config.instance_prompt, *config.captions.more_instance_prompts))
    if config.caption_strategy == "filename":
        return (_caption_from_name(target),)
    if config.caption_strategy in CAPTION_TABLES:
        if listed:
            return listed
        raise DatasetError(
            f"{shown(target)}: no caption in {shown(config.captions.caption_file)}. Add a row with "
            f"the target's path below the target folder in the column {config.captions.filename_column!r}."
        )
    if text_file is None:
        raise DatasetError(
            f"{shown(target)}: no caption; looked for {shown(target.with_suffix('.txt').name)} next to it. Write "
            "the edit instruction into that file."
        )
    return read_caption_file(text_file, split=not config.captions.disable_multiline_split)


def read_caption_file(path: Path, *, split: bool = True) -> tuple[str, ...]:
    """One caption per non-blank line, stripped. Without `split`, the whole text is one caption.

    The file is UTF-8, with or without a byte order mark.

    Raises:
        DatasetError: the file can't be read, is not UTF-8, is larger than 1 MB, or has only blank lines.
    """
    text = read_text(path)
    lines = (line.strip() for line in (text.split("\n") if split else [text]))
    captions = tuple(line for line in lines if not is_blank(line))
    if not captions:
        raise DatasetError(
            f"{shown(path)}: the caption file is empty or has no visible character. Write the edit instruction into it."
        )
    return captions


def read_text(path: Path) -> str:
    """The whole text of a caption file, with plain line ends. The file is UTF-8, with or without a byte order mark.

    Raises:
        DatasetError: the file can't be read, is not UTF-8, or is larger than 1 MB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CAPTION_FILE_BYTES + 1)
    except OSError as error:
        raise DatasetError(
            f"{shown(path)}: the caption file can't be read ({error.strerror}). Check its permissions."
        ) from error
    if len(content) > MAX_CAPTION_FILE_BYTES:
        raise DatasetError(f"{shown(path)}: the caption file is larger than 1 MB. Replace it with a short text.")
    return decoded_text(content, path)


def decoded_text(content: bytes, path: Path) -> str:
    """The text of a caption file with this content. `path` is for messages.

    Raises:
        DatasetError: the content is not UTF-8.
    """
    text = None if b"\0" in content else _utf8(content)  # UTF-16 text in English is full of zero bytes
    if text is None:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content
        kind = " (it looks like UTF-16)" if utf16 else ""
        raise DatasetError(f"{shown(path)}: the caption file is not UTF-8 text{kind}. Save it as UTF-8.")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _utf8(content: bytes) -> str | None:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return None


def _caption_from_name(target: Path) -> str:
    caption = unicodedata.normalize("NFC", target.stem.replace("_", " ")).strip()
    if is_blank(caption):
        raise DatasetError(
            f"{shown(target)}: its name contains no words to use as a caption. Rename it or change caption_strategy."
        )
    return caption
