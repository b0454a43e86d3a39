"""Read pictures of any supported format as upright 8-bit RGB."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageFile, ImageOps

from ..errors import DatasetError
from ..geometry import Size
from ..text import reason_of, shown
from .colour_profiles import STATED_WITHIN, ColourProfile, colour_profile, stated_space, to_srgb
from .png_texts import without_texts

_FORMAT_OF = {  # the formats that are read, by extension; a file's content decides which of them it is
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), "JPEG"),
    **dict.fromkeys((".png", ".apng"), "PNG"),
    **dict.fromkeys((".webp",), "WEBP"),
    **dict.fromkeys((".bmp", ".dib"), "BMP"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".gif",), "GIF"),
    **dict.fromkeys((".avif",), "AVIF"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm"), "PPM"),
    **dict.fromkeys((".qoi",), "QOI"),
    **dict.fromkeys((".tga",), "TGA"),
}
PICTURE_SUFFIXES = frozenset(_FORMAT_OF)
UNREAD_PICTURE_SUFFIXES = frozenset(
    {".heic", ".heif", ".jxl", ".jp2", ".j2k", ".jpf", ".jpx", ".exr", ".hdr", ".pfm", ".ico", ".dds", ".pcx", ".sgi"}
    | {".psd", ".psb", ".xcf", ".kra", ".svg", ".eps", ".ai", ".pdf"}  # layers, or drawings without pixels
    | {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"}  # raw data of cameras
)
MAX_PICTURE_PIXELS = 178_000_000  # just below the size at which Pillow refuses a picture
LARGE_PICTURE_PIXELS = 32_000_000  # larger ones are decoded one at a time to limit memory use

_UNSIGNED = "TGA"  # has no signature, so only files named like it are tried
_SIXTEEN_BIT = 65535
_PHOTOMETRIC = 262  # TIFF tag: 0 if the value 0 is white
_TO_SRGB = "srgb"
_ORIENTATION = 274  # EXIF tag
_QUARTER_TURNS = (5, 6, 7, 8)  # orientations that exchange width and height
_one_large_picture = threading.Lock()


class Picture(NamedTuple):
    """What a file shows, upright.

    `pixels` are RGB, also below transparent parts; `alpha` is a mask of mode L, None if the picture is opaque.
    `profile` is a colour profile that is not sRGB. `corrections` name what Pillow reads wrongly and is put right here.
    """

    pixels: Image.Image
    alpha: Image.Image | None
    profile: ColourProfile | None
    animated: bool
    corrections: tuple[str, ...]

    def on_white(self) -> Image.Image:
        """The RGB picture with its transparent parts on white."""
        if self.alpha is None:
            return self.pixels
        white = Image.new("RGB", self.pixels.size, (255, 255, 255))
        white.paste(self.pixels, mask=self.alpha)
        return white


def content_name(sha256: str, corrections: tuple[str, ...], *, to_srgb: bool) -> str:
    """Names the pixels that are read from a file: its SHA-256, and what is done to it besides decoding.

    Cache keys are made of it, so pixels that are read in another way get other keys.
    """
    return "+".join((sha256, *corrections, *([_TO_SRGB] if to_srgb else [])))


def is_converted(content: str) -> bool:
    """Whether a picture with this `content_name` is converted to sRGB."""
    return _TO_SRGB in content.split("+")[1:]


def open_picture(path: Path, *, convert: bool = True) -> Image.Image:
    """The picture as upright 8-bit RGB, fully decoded and without metadata.

    Applies the EXIF orientation, puts transparency on white, scales 16 bits to 8, and reads only the first of several
    frames. With `convert`, colours are converted to sRGB if the file has another colour profile.

    Raises:
        DatasetError: the file can't be read as a picture; names the file, the problem and what to do.
    """
    with open_picture_file(path) as file:
        return decode_picture(file, path, convert=convert).on_white()


def open_reduced(path: Path, side: int, *, convert: bool) -> Image.Image:
    """`open_picture`, scaled down so that its longer side has at most `side` pixels and the shorter one at least 16.

    Much faster for JPEG files, which are decoded at about that size.

    Raises:
        DatasetError: as `open_picture`.
    """
    with open_picture_file(path) as file:
        picture = decode_picture(file, path, convert=convert, side=side).on_white()
    size = _reduced(picture.size, side)
    return picture.resize(size, Image.Resampling.LANCZOS, reducing_gap=2.0) if size != picture.size else picture


def open_checked_picture(path: Path, content: str) -> Image.Image:
    """`open_picture` for a file that must still be the one whose `content_name` is `content`. Decides `convert`.

    Raises:
        DatasetError: the file changed, is gone, or can't be read.
    """
    return read_checked(path, content).on_white()


def read_checked(path: Path, content: str) -> Picture:
    """What a file shows whose SHA-256 must still be the one in `content`, from before until after decoding.

    Raises:
        DatasetError: the file changed, is gone, or can't be read.
    """
    with open_picture_file(path) as file:
        before = os.fstat(file.fileno())
        same = stream_digest(file) == content.split("+")[0]
        picture = decode_picture(file, path, convert=is_converted(content)) if same else None
        after = os.fstat(file.fileno())
    if picture is None or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise DatasetError(
            f"{shown(path)}: the file has changed since the folders were checked. Check the dataset again."
        )
    return picture


def decode_picture(file: BinaryIO, path: Path, *, convert: bool, side: int = 0) -> Picture:
    """Decodes an open file. `path` is used for messages, and to recognise formats without a signature.

    With `side`, a JPEG file is scaled down to that longer side while it is decoded.
    """
    file.seek(0)
    start = file.read(STATED_WITHIN)
    file, profile = without_texts(file)
    with _header(file, path) as picture:
        large = picture.width * picture.height > LARGE_PICTURE_PIXELS
        try:
            with _one_large_picture if large else nullcontext():
                return _decoded(picture, path, _Colours(profile, start), convert=convert, side=side)
        except DatasetError:
            raise
        except Exception as error:  # decoders raise almost any exception for damaged files
            raise DatasetError(
                f"{shown(path)}: the picture is damaged or cut short ({reason_of(error)}). "
                "Save or copy it again, or remove the pair."
            ) from error


def stream_digest(file: BinaryIO) -> str:
    """SHA-256 of the rest of an open file, hexadecimal. Reads it in chunks."""
    digest = hashlib.sha256()
    while piece := file.read(1 << 20):
        digest.update(piece)
    return digest.hexdigest()


class PictureHeader(NamedTuple):
    """What a picture's header says: the format by Pillow's name, and the size of the upright picture."""

    format: str
    size: Size


def picture_header(path: Path, name: str = "") -> PictureHeader:
    """Format and size of a picture, without decoding it. `name` stands for the path in messages and for its extension.

    Raises:
        DatasetError: the file can't be opened as a picture, or the picture is too large to decode.
    """
    named = Path(name) if name else path
    with open_picture_file(path) as file:
        try:
            return _read_header(file, named)
        except DatasetError:  # perhaps because of a PNG's texts; without them it has to be copied, which takes longer
            return _read_header(without_texts(file)[0], named)


def _read_header(file: BinaryIO, path: Path) -> PictureHeader:
    with _header(file, path) as picture:
        width, height = picture.size
        try:
            # Pillow decodes a PNG to look for EXIF that its header lacks.
            has_exif = "exif" in picture.info or picture.format == "TIFF"
            turned = has_exif and picture.getexif().get(_ORIENTATION, 1) in _QUARTER_TURNS
        except Exception:  # noqa: BLE001 - a damaged EXIF block raises almost anything
            turned = False
        kind = "JPEG" if picture.format == "MPO" else str(picture.format)
        return PictureHeader(kind, Size(height, width) if turned else Size(width, height))


def format_of(name: str) -> str:
    """Pillow's name of the format that a file name's extension stands for; empty if it is not read."""
    return _FORMAT_OF.get(Path(name).suffix.lower(), "")


def suffix_of(picture_format: str) -> str:
    """The usual extension of a format."""
    return next(suffix for suffix, name in _FORMAT_OF.items() if name == picture_format)


def accepts_cut_pictures() -> bool:
    """Whether other code in this process told Pillow to fill truncated pictures with grey instead of failing."""
    return bool(ImageFile.LOAD_TRUNCATED_IMAGES)


@contextmanager
def open_picture_file(path: Path) -> Generator[BinaryIO]:
    """Open a regular file for reading bytes. Turns every OSError into a DatasetError that names the file."""
    try:
        if not path.is_file():  # opening a pipe would block forever
            raise DatasetError(f"{shown(path)}: there is no such file. Restore it, or correct the path.")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise DatasetError(
            f"{shown(path)}: the file can't be read ({reason_of(error)}). Check its permissions and the disk."
        ) from error


@contextmanager
def _header(file: BinaryIO, path: Path) -> Generator[Image.Image]:
    """The picture in an open file, not decoded yet. Refuses pictures that are too large to decode."""
    file.seek(0)
    if not file.read(1):
        raise DatasetError(f"{shown(path)}: the file is empty (0 bytes). Copy it again or remove the pair.")
    file.seek(0)
    try:
        picture = _opened(file, path)
    except Exception as error:  # damaged headers raise almost anything
        raise DatasetError(
            f"{shown(path)}: the picture can't be opened ({reason_of(error)}). Its header is damaged, or it is of a "
            "rare kind. Save it as PNG or JPEG, copy it again, or remove the pair."
        ) from error
    if picture is None:
        raise DatasetError(
            f"{shown(path)}: this file is damaged or not a supported picture, whatever its name says. Save the picture "
            "again as PNG or JPEG, or remove the pair."
        )
    with picture:
        if picture.width * picture.height > MAX_PICTURE_PIXELS:
            raise _too_large(path, f"{picture.width} x {picture.height}")
        yield picture


def _opened(file: BinaryIO, path: Path) -> ImageFile.ImageFile | None:
    """The picture in one of our formats, or None. Unlike Image.open, it raises no warning about large pictures."""
    Image.init()
    start = file.read(16)
    own, problem = _FORMAT_OF.get(path.suffix.lower()), None
    for name in dict.fromkeys(_FORMAT_OF.values()):  # never a format that starts another program
        factory, accepts = Image.OPEN.get(name, (None, None))
        if factory is None or (name == _UNSIGNED and own != name):
            continue
        accepted = accepts is None or accepts(start)
        if isinstance(accepted, str):
            raise OSError(accepted)  # Pillow was built without this format
        if accepted:
            file.seek(0)
            try:
                return factory(file, "")
            except SyntaxError as error:  # how Pillow says that it is not this format after all
                problem = problem or error
    if problem is not None:
        raise problem
    return None


def _too_large(path: Path, found: str) -> DatasetError:
    return DatasetError(
        f"{shown(path)}: the picture must have at most {MAX_PICTURE_PIXELS // 10**6} million pixels, got {found}. "
        "Make it smaller; a few megapixels are enough for training."
    )


def _reduced(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = side / max(size)
    return size if scale >= 1 else (max(16, round(size[0] * scale)), max(16, round(size[1] * scale)))


def _loaded(picture: ImageFile.ImageFile, side: int) -> Image.Image:
    """The picture's pixels. With `side`, those of a JPEG file are scaled down to that longer side."""
    size = _reduced(picture.size, side) if side else picture.size
    drafted = picture.draft(picture.mode, size) if size != picture.size else None
    picture.load()
    if drafted is None:
        return picture
    _, box = drafted  # the last row and column of what was decoded may reach beyond the picture
    return picture.resize(size, Image.Resampling.LANCZOS, box=box)


class _Colours(NamedTuple):
    """What a file says about its colours: a PNG's profile, and the file's first bytes for `stated_space`."""

    profile: bytes | None
    start: bytes


def _decoded(source: ImageFile.ImageFile, path: Path, colours: _Colours, *, convert: bool, side: int) -> Picture:
    animated = source.format != "MPO" and bool(getattr(source, "is_animated", False))  # MPO: a phone's depth map
    corrections = tuple(_corrections(source, path))
    picture = _loaded(source, side)
    ImageOps.exif_transpose(picture, in_place=True)  # in place, because a copy would double the memory
    icc = colours.profile if source.format == "PNG" else picture.info.get("icc_profile")
    base, alpha = _layers(picture, path)
    if alpha is not None and alpha.getextrema() == (255, 255):
        alpha = None
    profile = stated_space(picture, colours.start) if icc is None else colour_profile(icc, base.mode)
    if picture.mode == "LAB":  # Pillow has converted it
        profile = None
    if convert and icc is not None and profile is not None and not profile.problem:
        base = to_srgb(base, icc)
    rgb = base if base.mode == "RGB" and base is not picture else base.convert("RGB")
    rgb.info = {}
    return Picture(rgb, alpha, profile, animated, corrections)


def _corrections(picture: ImageFile.ImageFile, path: Path) -> Generator[str]:
    """What Pillow reads wrongly in this file. Corrects what must be corrected before decoding."""
    if _white_is_zero(picture):
        yield "white is zero"
    raw = str(picture.tile[0][3]) if picture.format == "PNG" and picture.tile else ""
    if "transparency" in picture.info and raw == "RGB;16B":
        raise DatasetError(
            f"{shown(path)}: it has 16 bits per channel and a colour that means transparent. Save it with an alpha "
            "channel or 8 bits per channel."
        )
    if isinstance(picture.info.get("transparency"), int) and raw in ("I;16B", "L;2", "L;4"):
        yield "transparent grey"
        if raw != "I;16B":
            picture.info["transparency"] *= 85 if raw == "L;2" else 17  # to the 8 bits that the grey values get


def _white_is_zero(picture: Image.Image) -> bool:
    """Whether this is a TIFF of 16 bits in which 0 is white. Pillow reads its values as they are."""
    tags = getattr(picture, "tag_v2", None)
    return picture.mode.startswith("I;16") and tags is not None and tags.get(_PHOTOMETRIC) == 0


def _layers(picture: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """The picture with 8 bits as L, RGB or CMYK, and its alpha channel; None if it has none."""
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        return _from_16_bit(picture, path)
    if picture.mode == "F":
        raise DatasetError(
            f"{shown(path)}: the picture has floating-point values, whose white level is unknown. "
            "Save it with 8 or 16 bits per channel."
        )
    if picture.mode == "La":
        picture = picture.convert("LA")
    palette = getattr(picture.palette, "mode", "") if picture.mode == "P" else ""
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or "transparency" in picture.info or palette.endswith("A"):
        layer = picture.convert("LA" if picture.mode == "LA" else "RGBA")
        alpha = layer.getchannel("A")
        return layer.getchannel("L") if layer.mode == "LA" else layer.convert("RGB"), alpha
    if picture.mode == "1":
        return picture.convert("L"), None
    return picture if picture.mode in ("L", "RGB", "CMYK") else picture.convert("RGB"), None


def _from_16_bit(picture: Image.Image, path: Path) -> tuple[Image.Image, Image.Image | None]:
    """Scale 16-bit grey to 8 bits: 0 stays 0 and 65535 becomes 255 (65535 / 255 = 257)."""
    values = np.asarray(picture).astype(np.int64)
    if values.min() < 0 or values.max() > _SIXTEEN_BIT:
        raise DatasetError(
            f"{shown(path)}: its values range from {values.min()} to {values.max()}, which exceeds 16 bits. "
            "Save it with 8 or 16 bits per channel."
        )
    key = picture.info.get("transparency")
    alpha = Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8)) if isinstance(key, int) else None
    if _white_is_zero(picture):
        values = _SIXTEEN_BIT - values
    return Image.fromarray(((values + 128) // 257).astype(np.uint8)), alpha
