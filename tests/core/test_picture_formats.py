"""Rarer formats, and files whose details Pillow reads wrongly or refuses: texts, transparent greys, polarity."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, features

from tests.support.picture_files import STORED_AS, colours, decoded, pixels, png_chunk, sixteen_bit_rgb_png
from trainer_core.data import images
from trainer_core.data.area import resize_area
from trainer_core.data.images import open_picture
from trainer_core.errors import DatasetError
from trainer_core.geometry import Box, Size


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.apng", {"format": "PNG"}),
        ("a.dib", {"format": "BMP"}),
        ("a.ppm", {}),
        ("a.pnm", {}),
        ("a.tga", {}),
        ("a.tga", {"compression": "tga_rle"}),
        ("a.qoi", {}),
    ],
)
def test_rarer_formats_keep_every_value(tmp_path, name, options):
    colours().save(tmp_path / name, **options)
    assert (tmp_path / name).suffix in images.PICTURE_SUFFIXES
    assert (pixels(open_picture(tmp_path / name)) == pixels(colours())).all()


def test_grey_maps_animations_and_the_names_of_jpegs(tmp_path):
    colours().convert("L").save(tmp_path / "a.pgm")
    colours().convert("1").save(tmp_path / "a.pbm")
    Image.fromarray(np.array([[0, 257, 65535]], dtype=np.uint16)).save(tmp_path / "sixteen.pgm")
    assert (pixels(open_picture(tmp_path / "a.pgm")) == pixels(colours().convert("L"))[..., None]).all()
    assert (pixels(open_picture(tmp_path / "a.pbm")) == pixels(colours().convert("1").convert("L"))[..., None]).all()
    assert pixels(open_picture(tmp_path / "sixteen.pgm"))[0, :, 0].tolist() == [0, 1, 255]
    frames = [Image.new("P", (8, 8), number) for number in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert pixels(open_picture(tmp_path / "a.gif"))[0, 0].tolist() == [255, 0, 0]
    assert decoded(tmp_path / "a.gif").animated
    for name in ("a.jfif", "a.jpe"):
        colours().save(tmp_path / name, "JPEG", quality=98, subsampling=0)
        assert np.abs(pixels(open_picture(tmp_path / name)) - pixels(colours())).max() <= 6
    if features.check("avif"):
        colours().save(tmp_path / "a.avif", quality=98)
        assert np.abs(pixels(open_picture(tmp_path / "a.avif")) - pixels(colours())).max() <= 12


def test_a_tga_is_only_read_under_its_own_name(tmp_path):
    colours().save(tmp_path / "a.tga")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.tga").read_bytes())
    with pytest.raises(DatasetError, match=r"a\.png: this file is damaged or not a supp"):
        open_picture(tmp_path / "a.png")


def test_a_pillow_without_a_format_is_named(tmp_path, monkeypatch):
    colours().save(tmp_path / "a.webp")
    Image.init()
    words = "image file could not be identified because WEBP support not installed"
    monkeypatch.setitem(Image.OPEN, "WEBP", (Image.OPEN["WEBP"][0], lambda _start: words))
    with pytest.raises(DatasetError, match=r"a\.webp: .*WEBP support not installed"):
        open_picture(tmp_path / "a.webp")


@pytest.mark.parametrize("kind", [b"zTXt", b"iTXt"])
@pytest.mark.parametrize("after_pixels", [False, True])
def test_large_texts_in_a_png_are_no_obstacle(tmp_path, kind, after_pixels):
    path = tmp_path / "a.png"
    colours().save(path)
    zipped = zlib.compress(bytes(3_000_000))
    data = b"workflow\0\0" + zipped if kind == b"zTXt" else b"workflow\0\x01\0\0\0" + zipped
    whole = path.read_bytes()
    place = len(whole) - 12 if after_pixels else 33  # before the last chunk, or after the first
    path.write_bytes(whole[:place] + png_chunk(kind, data) + whole[place:])
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"), Image.open(path) as opened:
        opened.load()
    assert (pixels(open_picture(path)) == pixels(colours())).all()


def test_texts_that_pillow_takes_for_values_have_no_effect(tmp_path):
    texts = PngImagePlugin.PngInfo()
    for key in ("transparency", "icc_profile", "exif", "dpi", "workflow"):
        texts.add_text(key, "12")
    colours().save(tmp_path / "a.png", pnginfo=texts)
    assert (pixels(open_picture(tmp_path / "a.png")) == pixels(colours())).all()


@pytest.mark.parametrize("zipped", [False, True])
def test_an_orientation_in_a_text_is_applied(tmp_path, zipped):
    texts = PngImagePlugin.PngInfo()
    texts.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="6"/>', zip=zipped)
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[6](np.asarray(colours()))))
    stored.save(tmp_path / "a.png", pnginfo=texts)
    assert (pixels(open_picture(tmp_path / "a.png")) == pixels(colours())).all()


def grey_png(path: Path, bits: int, row: bytes, key: int) -> None:
    """A grey PNG of one row of four pixels, in which the value `key` means transparent."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 1, bits, 0, 0, 0, 0))
    body = header + png_chunk(b"tRNS", struct.pack(">H", key)) + png_chunk(b"IDAT", zlib.compress(b"\0" + row))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b""))


@pytest.mark.parametrize(
    ("bits", "row", "key", "expected"),
    [
        (16, struct.pack(">4H", 0, 257 * 100, 257 * 100 + 1, 65535), 257 * 100, [0, 255, 100, 255]),
        (8, bytes([0, 100, 101, 255]), 100, [0, 255, 101, 255]),
        (4, bytes([0x05, 0xAF]), 5, [0, 255, 170, 255]),
        (2, bytes([0b00_01_10_11]), 1, [0, 255, 170, 255]),
        (1, bytes([0b0101_0000]), 0, [255, 255, 255, 255]),
        (1, bytes([0b0101_0000]), 1, [0, 255, 0, 255]),
    ],
)
def test_a_grey_that_means_transparent_becomes_white(tmp_path, bits, row, key, expected):
    grey_png(tmp_path / "a.png", bits, row, key)
    assert pixels(open_picture(tmp_path / "a.png"))[0, :, 0].tolist() == expected


def test_sixteen_bit_colour_with_a_transparent_colour_is_refused(tmp_path):
    sixteen_bit_rgb_png(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[:33] + png_chunk(b"tRNS", struct.pack(">3H", 0, 1, 2)) + whole[33:])
    with pytest.raises(DatasetError, match=r"a\.png: .*16 bits per channel and a colour that means transparent"):
        open_picture(tmp_path / "a.png")


def white_is_zero(path: Path, order: str, **options: object) -> None:
    """A TIFF of 16 bits with the values 0, 257 and 65535, in which 0 is white."""
    values = np.array([[0, 257, 65535]], dtype=np.uint16).astype(f"{order}u2").tobytes()
    Image.frombytes("I;16" if order == "<" else "I;16B", (3, 1), values).save(path, **options)
    whole, tag = path.read_bytes(), struct.pack(f"{order}HHIH", 262, 3, 1, 1)
    assert whole.count(tag) == 1
    path.write_bytes(whole.replace(tag, struct.pack(f"{order}HHIH", 262, 3, 1, 0)))


@pytest.mark.parametrize("compression", ["raw", "tiff_lzw"])
def test_white_is_zero_keeps_its_polarity(tmp_path, compression):
    white_is_zero(tmp_path / "a.tif", "<", compression=compression)
    assert pixels(open_picture(tmp_path / "a.tif"))[0, :, 0].tolist() == [255, 254, 0]
    assert decoded(tmp_path / "a.tif").corrections == ("white is zero",)


def test_a_rare_kind_of_tiff_is_refused_with_the_reason(tmp_path):
    white_is_zero(tmp_path / "a.tif", ">")
    with pytest.raises(DatasetError, match=r"a\.tif: the picture can't be opened \(unknown pixel mode\).*rare kind"):
        open_picture(tmp_path / "a.tif")


def test_pillows_warning_about_large_pictures_is_not_raised(tmp_path, monkeypatch):
    colours().save(tmp_path / "a.png")
    for limit in (300, 100):  # Pillow would warn about the first and refuse under the second
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            picture = open_picture(tmp_path / "a.png")
            assert (pixels(picture) == pixels(colours())).all()
            assert resize_area(picture, Box(2, 1, 24, 16), Size(2, 3)).shape == (3, 3, 2)
