"""Pictures as people have them, read as upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageFile

from ..errors import DatasetError
from ..geometry import Size

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
UNREAD_PICTURE_SUFFIXES = frozenset(
    {".gif", ".heic", ".heif", ".avif", ".psd", ".jxl", ".jp2", ".svg", ".tga", ".exr", ".hdr", ".dng", ".cr2", ".nef"}
)
MAX_PICTURE_PIXELS = 178_000_000  # just below the size at which Pillow itself refuses a picture
LARGE_PICTURE_PIXELS = 32_000_000  # larger ones are decoded one after the other, so that memory stays flat

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF")  # nothing else is tried, whatever a file's name
_ORIENTATION, _TIFF_WIDTH, _TIFF_HEIGHT = 274, 256, 257  # EXIF and TIFF tags
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SIXTEEN_BIT = 65535
_one_large_picture = threading.Lock()


def shown(path: Path | str) -> str:
    """A file name fit for a message: characters that don't print (line breaks, broken Unicode) are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def open_picture(path: Path) -> Image.Image:
    """The picture as upright 8-bit RGB, fully decoded and without metadata.

    EXIF orientation is applied, transparency laid on white, 16 bits are scaled to 8, CMYK is converted without a
    profile; of several frames the first is taken.

    Raises:
        DatasetError: one sentence that names the file, what is wrong with it and what to do.
    """
    with open_picture_file(path) as file:
        return decode_picture(file, path)


def open_checked_picture(path: Path, digest: str) -> Image.Image:
    """`open_picture`, if the file's SHA-256 is still `digest`, also when decoding has come to its end.

    Raises:
        DatasetError: the file changed or went away, or it can't be read.
    """
    with open_picture_file(path) as file:
        before = os.fstat(file.fileno())
        same = stream_digest(file) == digest
        picture = decode_picture(file, path) if same else None
        after = os.fstat(file.fileno())
    if picture is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DatasetError(f"{shown(path)}: the file is another one than when the folders were checked.")
    return picture


def decode_picture(file: BinaryIO, path: Path) -> Image.Image:
    """`open_picture` for an open file; `path` only serves the messages."""
    with _header(file, path) as picture:
        large = picture.width * picture.height > LARGE_PICTURE_PIXELS
        try:
            with _one_large_picture if large else nullcontext():
                picture.load()
                rgb = _rgb(_turned(picture), path)
        except DatasetError:
            raise
        except Exception as error:  # decoders meet damaged files with almost any exception
            raise DatasetError(
                f"{shown(path)}: the picture is damaged or cut short ({_reason(error)}). "
                "Save or copy it again, or remove the pair."
            ) from error
    rgb.info = {}
    return rgb


def picture_size(path: Path) -> Size:
    """Width and height of the upright picture, from its header alone.

    Raises:
        DatasetError: the file can't be read, is no picture of a known kind, or is too large.
    """
    with open_picture_file(path) as file, _header(file, path) as picture:
        tags = getattr(picture, "tag_v2", None)  # newer releases of Pillow turn a TIFF's size, older ones don't
        width, height = (tags[_TIFF_WIDTH], tags[_TIFF_HEIGHT]) if tags else picture.size
        turned = _orientation(picture, path) >= 5
        return Size(height, width) if turned else Size(width, height)


def is_animated(file: BinaryIO, path: Path) -> bool:
    """Whether the open picture has more frames than the one that is read. A phone's JPEG with a depth map has not."""
    with _header(file, path) as picture:
        return picture.format != "MPO" and bool(getattr(picture, "is_animated", False))


def file_digest(path: Path) -> str:
    """SHA-256 of the file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return stream_digest(file)


def stream_digest(file: BinaryIO) -> str:
    """SHA-256 of what is left in an open file, hexadecimal; read in pieces."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


def accepts_cut_pictures() -> bool:
    """Whether another program in this process told Pillow to fill cut pictures with grey instead of complaining."""
    return bool(ImageFile.LOAD_TRUNCATED_IMAGES)


@contextmanager
def open_picture_file(path: Path) -> Generator[BinaryIO]:
    """An ordinary file, open for reading bytes; what goes wrong with it becomes a DatasetError that names it."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            raise DatasetError(f"{shown(path)}: there is no such file. Put it back or remove the pair.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DatasetError(
            f"{shown(path)}: the file can't be read ({_reason(error)}). Check its permissions and the disk."
        ) from error


@contextmanager
def _header(file: BinaryIO, path: Path) -> Generator[Image.Image]:
    """The picture of an open file, not yet decoded, of a size that may be decoded."""
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
            f"{shown(path)}: this is no JPEG, PNG, WebP, BMP or TIFF picture, whatever its name says, or its beginning "
            "is damaged. Convert or copy it again, or remove the pair."
        ) from error
    with picture:
        if picture.width * picture.height > MAX_PICTURE_PIXELS:
            raise _too_large(path, f"{picture.width} x {picture.height}")
        yield picture


def _too_large(path: Path, found: str) -> DatasetError:
    return DatasetError(
        f"{shown(path)}: the picture has {found} pixels; allowed are up to {MAX_PICTURE_PIXELS // 10**6} million. "
        "Make it smaller; a few megapixels are plenty for training."
    )


def _reason(error: BaseException) -> str:
    text = shown(getattr(error, "strerror", None) or str(error) or type(error).__name__)
    return text if len(text) <= 120 else text[:119] + "…"


def _orientation(picture: Image.Image, path: Path) -> int:
    try:
        value = picture.getexif().get(_ORIENTATION, 1)
    except Exception as error:
        raise DatasetError(
            f"{shown(path)}: its EXIF data is damaged ({_reason(error)}). Save it again without metadata."
        ) from error
    return value if value in _UPRIGHT else 1


def _turned(picture: Image.Image) -> Image.Image:
    """A decoded picture, upright. Pillow has already turned a TIFF and then says so by orientation 1."""
    turn = _UPRIGHT.get(picture.getexif().get(_ORIENTATION, 1))
    return picture if turn is None else picture.transpose(turn)


def _rgb(picture: Image.Image, path: Path) -> Image.Image:
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_16_bit(picture, path)
    if picture.mode == "F":
        raise DatasetError(
            f"{shown(path)}: the picture holds floating-point numbers, whose white is not known. "
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
    """Grey of 16 bits to 8 bits: 0 stays 0 and 65535 becomes 255, as 65535 / 255 = 257."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > _SIXTEEN_BIT:
        raise DatasetError(
            f"{shown(path)}: its values reach from {values.min()} to {values.max()}, more than 16 bits hold. "
            "Save it with 8 or 16 bits per channel."
        )
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
