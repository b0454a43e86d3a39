"""Pictures of all common formats and modes are read as upright RGB with 8 bits."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image, ImageFile

from tests.support.picture_files import (
    EXIF_ORIENTATION,
    STORED_AS,
    colours,
    decoded,
    pixels,
    png_chunk,
    sixteen_bit_rgb_png,
)
from trainer_core.data import images
from trainer_core.data.images import open_picture
from trainer_core.errors import DatasetError


@pytest.mark.parametrize(
    ("suffix", "options", "tolerance"),
    [
        (".png", {}, 0),
        (".PNG", {}, 0),
        (".bmp", {}, 0),
        (".tif", {}, 0),
        (".tiff", {"compression": "tiff_lzw"}, 0),
        (".TIFF", {"compression": "tiff_deflate"}, 0),
        (".webp", {"lossless": True}, 0),
        (".jpg", {"quality": 98, "subsampling": 0}, 6),
        (".JPEG", {"quality": 98, "subsampling": 0, "progressive": True}, 6),
    ],
)
def test_every_format_keeps_its_pixels(tmp_path, suffix, options, tolerance):
    path = tmp_path / f"picture{suffix}"
    colours().save(path, **options)
    assert path.suffix.lower() in images.PICTURE_SUFFIXES
    picture = open_picture(path)
    assert (picture.mode, picture.size, type(picture)) == ("RGB", (24, 16), Image.Image)
    assert np.abs(pixels(picture) - pixels(colours())).max() <= tolerance


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", sorted(STORED_AS))
def test_orientation_is_applied_exactly_once(tmp_path, orientation, suffix):
    path = tmp_path / f"picture{suffix}"
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](np.asarray(colours()))))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    stored.save(path, exif=exif, **({"lossless": True} if suffix == ".webp" else {"quality": 98, "subsampling": 0}))
    picture = open_picture(path)
    assert np.abs(pixels(picture) - pixels(colours())).max() <= (8 if suffix == ".jpg" else 0)
    assert picture.size == (24, 16)
    assert picture.getexif().get(EXIF_ORIENTATION, 1) == 1, "no orientation may be left that others apply again"


def test_cmyk_is_not_inverted(tmp_path):
    cyan, black, paper = (255, 0, 0, 0), (0, 0, 0, 255), (0, 0, 0, 0)
    picture = Image.new("CMYK", (48, 16), paper)
    picture.paste(cyan, (0, 0, 16, 16))
    picture.paste(black, (16, 0, 32, 16))
    for name in ("a.jpg", "a.tif"):
        picture.save(tmp_path / name)
        found = pixels(open_picture(tmp_path / name))
        assert np.abs(found[8, [8, 24, 40]] - [[0, 255, 255], [0, 0, 0], [255, 255, 255]]).max() <= 3, name


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path, name):
    values = np.array([[0, 128, 129, 257, 32768, 65407, 65535, 40000]], dtype=np.uint16).repeat(4, 0)
    Image.fromarray(values).save(tmp_path / name)
    found = pixels(open_picture(tmp_path / name))
    assert found[0, :, 0].tolist() == [0, 0, 1, 1, 128, 255, 255, 156]
    assert (found[..., 0] == found[..., 1]).all()
    assert (found[..., 0] == found[..., 2]).all()


def test_thirty_two_bit_integers_are_taken_for_sixteen_or_refused(tmp_path):
    path = tmp_path / "a.tif"
    Image.fromarray(np.array([[0, 65535]], dtype=np.int32)).save(path)
    assert pixels(open_picture(path))[0, :, 0].tolist() == [0, 255]
    Image.fromarray(np.array([[0, 70000]], dtype=np.int32)).save(path)
    with pytest.raises(DatasetError, match=r"a\.tif: its values range from 0 to 70000"):
        open_picture(path)


def test_floating_point_is_refused_with_a_way_out(tmp_path):
    Image.fromarray(np.zeros((2, 2), dtype=np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(DatasetError, match=r"a\.tiff: .*floating-point.*8 or 16 bits"):
        open_picture(tmp_path / "a.tiff")


def test_sixteen_bit_colour(tmp_path):
    sixteen_bit_rgb_png(tmp_path / "a.png")
    assert pixels(open_picture(tmp_path / "a.png")).tolist() == [[[255, 128, 0], [0, 1, 255]]]


def test_grey_and_black_and_white(tmp_path):
    grey = colours().convert("L")
    grey.save(tmp_path / "l.png")
    assert (pixels(open_picture(tmp_path / "l.png")) == pixels(grey)[..., None]).all()
    bits = grey.point(lambda value: 255 if value > 100 else 0).convert("1")
    bits.save(tmp_path / "1.png")
    bits.save(tmp_path / "1.bmp")
    for name in ("1.png", "1.bmp"):
        found = pixels(open_picture(tmp_path / name))
        assert set(np.unique(found)) == {0, 255}
        assert (found[..., 0] == pixels(bits.convert("L"))).all()


def transparent_red(mode: str) -> Image.Image:
    """Three red pixels (grey 100 for LA) with alpha 0, 128 and 255."""
    picture = Image.new("RGBA", (3, 1), (255, 0, 0, 0) if mode == "RGBA" else (100, 100, 100, 0))
    for x, alpha in enumerate((0, 128, 255)):
        picture.putpixel((x, 0), (*picture.getpixel((x, 0))[:3], alpha))
    return picture.convert(mode)


@pytest.mark.parametrize(
    ("mode", "name", "expected"),
    [
        ("RGBA", "a.png", [[255, 255, 255], [255, 127, 127], [255, 0, 0]]),
        ("RGBA", "a.tif", [[255, 255, 255], [255, 127, 127], [255, 0, 0]]),
        ("RGBA", "a.webp", [[255, 255, 255], [255, 127, 127], [255, 0, 0]]),
        ("LA", "a.png", [[255, 255, 255], [177, 177, 177], [100, 100, 100]]),
    ],
)
def test_transparency_is_laid_on_white(tmp_path, mode, name, expected):
    transparent_red(mode).save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
    assert np.abs(pixels(open_picture(tmp_path / name))[0] - expected).max() <= 1


def test_palettes_with_and_without_transparency(tmp_path):
    picture = Image.new("P", (3, 1))
    picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    picture.putdata([0, 1, 2])
    picture.save(tmp_path / "opaque.png")
    picture.save(tmp_path / "key.png", transparency=1)
    picture.save(tmp_path / "alpha.png", transparency=bytes([255, 128, 0]))
    assert pixels(open_picture(tmp_path / "opaque.png"))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    assert pixels(open_picture(tmp_path / "key.png"))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]
    alpha = pixels(open_picture(tmp_path / "alpha.png"))[0]
    assert np.abs(alpha - [[255, 0, 0], [127, 255, 127], [255, 255, 255]]).max() <= 1


def test_a_colour_that_means_transparent(tmp_path):
    picture = Image.new("RGB", (2, 1), (10, 20, 30))
    picture.putpixel((1, 0), (40, 50, 60))
    picture.save(tmp_path / "a.png", transparency=(10, 20, 30))
    assert pixels(open_picture(tmp_path / "a.png"))[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_the_first_of_several_frames(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for name, options in (("a.webp", {"lossless": True}), ("a.png", {}), ("a.tif", {})):
        path = tmp_path / name
        frames[0].save(path, save_all=True, append_images=frames[1:], **options)
        assert pixels(open_picture(path))[0, 0].tolist() == [255, 0, 0]
        assert decoded(path).animated


def test_a_phones_jpeg_with_a_second_picture_is_not_animated(tmp_path):
    path = tmp_path / "a.jpg"
    colours().save(path, format="MPO", save_all=True, append_images=[colours()])
    assert Image.open(path).format == "MPO"
    assert not decoded(path).animated
    assert open_picture(path).size == (24, 16)


def test_a_png_named_jpg_is_read(tmp_path):
    colours().save(tmp_path / "a.jpg", format="PNG")
    assert (pixels(open_picture(tmp_path / "a.jpg")) == pixels(colours())).all()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
def test_cut_files_are_refused(tmp_path, name):
    path = tmp_path / name
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    whole = path.read_bytes()
    open_picture(path)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DatasetError, match=rf"{name}: .*damaged"):
        open_picture(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"just some text", "damaged or not a supported picture, whatever its name"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "damaged or not a supported picture, whatever its name"),
        (b"GIF89a" + bytes(30), "can't be opened .*damaged"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9), "can't be opened .*damaged"),
        (b"\xff\xd8\xff\xe0" + bytes(9), "can't be opened .*damaged"),
    ],
)
def test_other_content_is_refused(tmp_path, content, message):
    path = tmp_path / "a.png"
    path.write_bytes(content)
    with pytest.raises(DatasetError, match=rf"a\.png: .*{message}"):
        open_picture(path)


def test_missing_files_and_folders_are_refused(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for name in ("none.png", "folder.png"):
        with pytest.raises(DatasetError, match=rf"{name}: there is no such file"):
            open_picture(tmp_path / name)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("width", [12_000, 16_000, 60_000])  # Pillow warns about the first and refuses the others
def test_bombs_are_refused_by_their_header(tmp_path, width, monkeypatch):
    monkeypatch.setattr(images, "MAX_PICTURE_PIXELS", 10_000 * 12_000)

    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, 12_000, 8, 2, 0, 0, 0))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b""))
    with pytest.raises(DatasetError, match=r"a\.png: .*120 million"):
        open_picture(tmp_path / "a.png")


def test_pillow_is_left_as_it_was(tmp_path):
    colours().save(tmp_path / "a.png")
    before = (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
    open_picture(tmp_path / "a.png")
    assert before == (ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS)
