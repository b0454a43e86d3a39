"""Read pictures of any supported format as upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..errors import DatasetError
from ..text import shown

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
UNREAD_PICTURE_SUFFIXES = frozenset(
    {".gif", ".heic", ".heif", ".avif", ".psd", ".jxl", ".jp2", ".svg", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef"}
)
MAX_PICTURE_PIXELS = 178_000_000  # just below the size at which Pillow refuses a picture
LARGE_PICTURE_PIXELS = 32_000_000  # larger ones are decoded one at a time to limit memory use

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # Pillow tries only these, whatever the file's extension
_SIXTEEN_BIT = 65535
_one_large_picture = threading.Lock()


def open_picture(path: Path) -> Image.Image:
    """The picture as upright 8-bit RGB, fully decoded and without metadata.

    Applies the EXIF orientation, puts transparency on white, scales 16 bits to 8, converts CMYK without a colour
    profile, and reads only the first of several frames.

    Raises:
        DatasetError: the file can't be read as a picture; names the file, the problem and what to do.
    """
    with open_picture_file(path) as file:
        return decode_picture(file, path)


def open_checked_picture(path: Path, digest: str) -> Image.Image:
    """`open_picture` for a file whose SHA-256 must still be `digest`, from before until after decoding.

    Raises:
        DatasetError: the file changed, is gone, or can't be read.
    """
    with open_picture_file(path) as file:
        before = os.fstat(file.fileno())
        same = stream_digest(file) == digest
        picture = decode_picture(file, path) if same else None
        after = os.fstat(file.fileno())
    if picture is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DatasetError(
            f"{shown(path)}: the file has changed since the folders were checked. Check the dataset again."
        )
    return picture


def decode_picture(file: BinaryIO, path: Path) -> Image.Image:
    """`open_picture` for an open file. `path` is only used in messages."""
    with _header(file, path) as picture:
        large = picture.width * picture.height > LARGE_PICTURE_PIXELS
        try:
            with _one_large_picture if large else nullcontext():
                picture.load()
                ImageOps.exif_transpose(picture, in_place=True)  # in place, because a copy would double the memory
                rgb = _rgb(picture, path)
        except DatasetError:
            raise
        except Exception as error:  # decoders raise almost any exception for damaged files
            raise DatasetError(
                f"{shown(path)}: the picture is damaged or cut short ({_reason(error)}). "
                "Save or copy it again, or remove the pair."
            ) from error
    rgb.info = {}
    return rgb


def is_animated(file: BinaryIO, path: Path) -> bool:
    """Whether the picture has several frames. A phone's JPEG with a depth map (MPO) does not count as animated."""
    with _header(file, path) as picture:
        return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))


def stream_digest(file: BinaryIO) -> str:
    """SHA-256 of the rest of an open file, hexadecimal. Reads it in chunks."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def accepts_cut_pictures() -> bool:
    """Whether other code in this process told Pillow to fill truncated pictures with grey instead of failing."""
    return bool(ImageFile.LOAD_TRUNCATED_IMAGES)


@contextmanager
def open_picture_file(path: Path) -> Generator[BinaryIO]:
    """Open a regular file for reading bytes. Turns every OSError into a DatasetError that names the file."""
    try:
        if not path.is_file():  # opening a pipe would block forever
            raise DatasetError(f"{shown(path)}: there is no such file. Restore it or remove the pair.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DatasetError(
            f"{shown(path)}: the file can't be read ({_reason(error)}). Check its permissions and the disk."
        ) from error


@contextmanager
def _header(file: BinaryIO, path: Path) -> Generator[Image.Image]:
    """The picture in an open file, not decoded yet. Refuses pictures that are too large to decode."""
    file.seek(0)
    if not file.read(1):
        raise DatasetError(f"{shown(path)}: the file is empty (0 bytes). Copy it again or remove the pair.")
    file.seek(0)
    try:
        picture = Image.open(file, formats=_FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(path, "more") from error
    except Exception as error:  # damaged headers raise almost anything
        raise DatasetError(
            f"{shown(path)}: this is not a JPEG, PNG, WebP, BMP or TIFF picture, whatever its extension, or its header "
            "is damaged. Convert or copy it again, or remove the pair."
        ) from error
    with picture:
        if picture.width * picture.height > MAX_PICTURE_PIXELS:
            raise _too_large(path, f"{picture.width} x {picture.height}")
        yield picture


def _too_large(path: Path, found: str) -> DatasetError:
    return DatasetError(
        f"{shown(path)}: the picture must have at most {MAX_PICTURE_PIXELS // 10**6} million pixels, got {found}. "
        "Make it smaller; a few megapixels are enough for training."
    )


def _reason(error: BaseException) -> str:
    text = shown(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    return text if len(text) <= 120 else text[:119] + "…"


def _rgb(picture: Image.Image, path: Path) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_16_bit(picture, path)
    if picture.mode == "F":
        raise DatasetError(
            f"{shown(path)}: the picture has floating-point values, whose white level is unknown. "
            "Save it with 8 or 16 bits per channel."
        )
    if picture.mode == "La":
        picture = picture.convert("LA")
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        white = Image.new("RGB", layer.size, (255, 255, 255))
        white.paste(layer, mask=layer.getchannel("A"))
        return white
    return picture.convert("RGB")


def _from_16_bit(picture: Image.Image, path: Path) -> Image.Image:
    """Scale 16-bit grey to 8 bits: 0 stays 0 and 65535 becomes 255 (65535 / 255 = 257)."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > _SIXTEEN_BIT:
        raise DatasetError(
            f"{shown(path)}: its values range from {values.min()} to {values.max()}, which exceeds 16 bits. "
            "Save it with 8 or 16 bits per channel."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
