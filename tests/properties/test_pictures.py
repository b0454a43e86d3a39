"""Picture files of any mode, format, orientation, profile and damage: the right pixels or our own error."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.support.icc import PRIMARIES, cmyk_profile, grey_profile, in_srgb, rgb_profile
from tests.support.limits import result_or_own_error
from tests.support.picture_files import EXIF_ORIENTATION, STORED_AS
from trainer_core.data import images
from trainer_core.data.images import Picture, decode_picture
from trainer_core.data.masks import mask_grey
from trainer_core.errors import DatasetError, TrainerError

PROFILES = {
    "none": None,
    "sRGB": rgb_profile("sRGB"),
    "Display P3": rgb_profile("Display P3"),
    "Adobe RGB": rgb_profile("Adobe RGB"),
    "grey": grey_profile(1.8),
    "ink": cmyk_profile(),
    "junk": b"no profile",
    "cut": rgb_profile("Display P3")[:400],
}
WITH_METADATA = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")
MODES = {  # format -> modes in which a file keeps every value; for JPEG and AVIF nearly
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"),
    "BMP": ("1", "L", "P", "RGB"),
    "WEBP": ("RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("1", "L", "LA", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P"),
    "QOI": ("RGB", "RGBA"),
    "JPEG": ("L", "RGB", "CMYK"),
    "AVIF": ("RGB", "RGBA"),
}
SUFFIXES = dict.fromkeys(MODES, ".png") | {"TGA": ".tga"}  # the content decides, except for a TGA
SIGNATURES = [
    *(b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"RIFF\xc0\0\0\0WEBPVP8L", b"BM", b"GIF89a"),
    *(b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"P6 4 4 255 ", b"P5 4 4 65535 ", b"P1 4 4 "),
    *(b"qoif\0\0\0\x04\0\0\0\x04\x04\0", b"\0\0\0\x20ftypavif\0\0\0\0avifmif1"),
]
LOSSY = {"JPEG": {"quality": 100, "subsampling": 0}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}
EXACT = {"WEBP": {"lossless": True, "exact": True}}


class Saved(NamedTuple):
    """A picture file, the RGB numbers of its upright picture without conversion, and its size."""

    name: str
    content: bytes
    shown: np.ndarray
    kind: str
    mode: str
    profile: str

    def __repr__(self) -> str:
        return f"{self.kind} {self.mode} {self.shown.shape[:2]} {self.profile} {len(self.content)} bytes"


def rgb_of(mode: str, values: np.ndarray) -> np.ndarray:
    """What values [H, W, channels] of a mode look like as RGB on white, in float."""
    values = values.astype(float)
    if mode == "P":
        return np.concatenate([values, 255 - values, values * 7 % 256], -1)
    if mode == "1":
        values = values * 255
    if mode == "I;16":
        values = np.floor((values + 128) / 257)
    if mode == "CMYK":
        return (255 - values[..., :3]) * (255 - values[..., 3:]) / 255
    if mode in ("LA", "RGBA"):
        share = values[..., -1:] / 255
        values = values[..., :-1] * share + 255 * (1 - share)
    return np.broadcast_to(values, (*values.shape[:2], 3))


def picture_of(mode: str, values: np.ndarray) -> Image.Image:
    """A Pillow picture with these values."""
    height, width = values.shape[:2]
    if mode == "1":
        return Image.fromarray((values[..., 0] * 255).astype(np.uint8)).convert("1", dither=Image.Dither.NONE)
    if mode == "P":
        picture = Image.new("P", (width, height))
        picture.putdata(values.ravel().tolist())
        picture.putpalette([part for level in range(256) for part in (level, 255 - level, level * 7 % 256)])
        return picture
    if mode == "I;16":
        return Image.frombytes("I;16", (width, height), values.astype("<u2").tobytes())
    if mode == "F":
        return Image.fromarray(values[..., 0].astype(np.float32))
    return Image.frombytes(mode, (width, height), values.astype(np.uint8).tobytes())


@st.composite
def saved(draw: st.DrawFn) -> Saved:
    kind = draw(st.sampled_from(sorted(MODES)))
    mode = draw(st.sampled_from(MODES[kind]))
    width, height = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    channels = {"LA": 2, "RGB": 3, "RGBA": 4, "CMYK": 4}.get(mode, 1)
    largest = {"1": 2, "I;16": 65536}.get(mode, 256)
    values = np.random.default_rng(draw(st.integers(0, 99))).integers(0, largest, (height, width, channels))
    if kind in LOSSY:  # one colour, because how well a format compresses is not measured
        values[:] = values[0, 0]
    options: dict[str, Any] = {**LOSSY.get(kind, {}), **EXACT.get(kind, {})}
    orientation, profile = 1, "none"
    if kind in WITH_METADATA:
        orientation, profile = draw(st.integers(1, 8)), draw(st.sampled_from(sorted(PROFILES)))
        exif = Image.Exif()
        exif[EXIF_ORIENTATION] = orientation
        options |= {"exif": exif, "icc_profile": PROFILES[profile]}
    file = io.BytesIO()
    picture_of(mode, STORED_AS[orientation](values)).save(file, kind, **options)
    return Saved(f"a{SUFFIXES[kind]}", file.getvalue(), rgb_of(mode, values), kind, mode, profile)


def read(content: bytes, name: str, *, convert: bool) -> Picture:
    return decode_picture(io.BytesIO(content), Path(name), convert=convert)


def is_converted(case: Saved) -> bool:
    """Whether the file's profile fits its picture, and shows it other than sRGB does."""
    mode = {"1": "L", "LA": "L", "I;16": "L", "P": "RGB", "RGBA": "RGB"}.get(case.mode, case.mode)
    fitting = {"L": ("grey", "Adobe RGB"), "RGB": ("Display P3", "Adobe RGB"), "CMYK": ("ink",)}
    return case.profile in fitting[mode]


@settings(max_examples=400)
@given(saved())
def test_a_whole_file_gives_its_pixels_upright(case: Saved) -> None:
    found = result_or_own_error(lambda: read(case.content, case.name, convert=False))
    if case.mode == "F":
        assert isinstance(found, DatasetError)
        return
    assert not isinstance(found, TrainerError), found
    rgb = found.on_white()
    assert (rgb.mode, type(rgb), rgb.info) == ("RGB", Image.Image, {})
    assert rgb.size == (case.shown.shape[1], case.shown.shape[0])
    assert np.abs(np.asarray(rgb) - case.shown).max() <= (3 if case.kind in LOSSY else 1)
    converted = read(case.content, case.name, convert=True).on_white()
    assert (found.profile is not None and not found.profile.problem) == is_converted(case)
    if not is_converted(case):
        assert converted.tobytes() == rgb.tobytes()
    elif case.profile in PRIMARIES and found.alpha is None:
        assert np.abs(np.asarray(converted) - in_srgb(rgb, case.profile)).mean() <= 0.5


@settings(max_examples=300)
@given(saved(), st.floats(0, 1), st.lists(st.tuples(st.floats(0, 1), st.integers(1, 255)), max_size=4), st.booleans())
def test_a_damaged_file_gives_a_picture_or_our_own_error(
    case: Saved, kept: float, flips: list[tuple[float, int]], convert: bool
) -> None:
    content = bytearray(case.content[: round(len(case.content) * (1 if flips else kept))])
    for place, change in flips:
        content[int(place * (len(content) - 1))] ^= change
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PICTURE_PIXELS", 4_000_000)  # a damaged header may state any size below the limit
        found = result_or_own_error(lambda: read(bytes(content), case.name, convert=convert))
    if not isinstance(found, TrainerError):
        assert found.on_white().mode == "RGB"
        weights = result_or_own_error(lambda: mask_grey(found, Path(case.name)))
        assert isinstance(weights, DatasetError) or weights.grey.size == found.pixels.size


@given(st.binary(max_size=200), st.sampled_from(sorted(images.PICTURE_SUFFIXES)), st.sampled_from(sorted(SIGNATURES)))
def test_any_bytes_give_a_picture_or_our_own_error(content: bytes, suffix: str, signature: bytes) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(images, "MAX_PICTURE_PIXELS", 4_000_000)
        found = result_or_own_error(lambda: read(signature + content, f"a{suffix}", convert=True))
    assert isinstance(found, (DatasetError, Picture))
