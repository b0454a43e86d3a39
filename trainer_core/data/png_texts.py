"""Leave the texts out of PNG files: Pillow refuses pictures with large ones, and takes some for its own values."""

from __future__ import annotations

import io
import shutil
import struct
import zlib
from typing import BinaryIO

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
_ORIENTATION = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")  # texts that may say how the picture is turned
_MAX_ORIENTATION = 100_000  # bytes of such a text, still zipped; it unpacks to less than Pillow's limit of 64 MB
_MAX_PROFILE = 16 << 20  # bytes of a colour profile


def without_texts(file: BinaryIO) -> tuple[BinaryIO, bytes | None]:
    """A PNG without its texts, and its colour profile; other files as they are, and None.

    The profile is read here because Pillow refuses pictures with a profile above 1 MB. A damaged one is empty.
    """
    file.seek(0)
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        file.seek(0)
        return file, None
    profile, kept, start, position = None, [], 0, len(_SIGNATURE)
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        end = position + 12 + length
        text = kind in _TEXTS
        if text or kind == b"iCCP":
            data = file.read(min(length, _MAX_PROFILE))
            if not text:
                profile = _profile(data)
            if not (text and data.startswith(_ORIENTATION) and length <= _MAX_ORIENTATION):
                kept.append((start, position))
                start = end
        position = end
        file.seek(position)
    file.seek(0)
    if not kept:
        return file, profile
    shorter = io.BytesIO()
    for first, last in kept:
        file.seek(first)
        shorter.write(file.read(last - first))
    file.seek(start)
    shutil.copyfileobj(file, shorter)
    shorter.seek(0)
    return shorter, profile


def _profile(chunk: bytes) -> bytes:
    """The profile in an iCCP chunk: a name, a zero byte, the compression method, the zipped profile."""
    try:
        unpacker = zlib.decompressobj()
        profile = unpacker.decompress(chunk[chunk.index(b"\0") + 2 :], _MAX_PROFILE)
    except (ValueError, zlib.error):
        return b""
    return b"" if unpacker.unconsumed_tail else profile
