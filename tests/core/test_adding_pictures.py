"""Pictures, captions and ZIP files from outside: their checks, and what hostile ones can't do."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from tests.support.data_sets import files, made
from tests.support.pair_files import text
from trainer_core.data_sets.adding import LIMITS, Added, Limits, add_file, received_file
from trainer_core.data_sets.changes import delete
from trainer_core.data_sets.folders import TRASH, DataSet, create_data_set, open_data_set, usage
from trainer_core.data_sets.moves import changing
from trainer_core.data_sets.names import AUTO
from trainer_core.data_sets.reading import read_data_set
from trainer_core.errors import DatasetError, DiskError
from trainer_core.files import temporary_beside


def png(seed: int = 0, size: tuple[int, int] = (16, 12), kind: str = "PNG") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", size, (seed % 256, 90, 120)).save(data, kind)
    return data.getvalue()


def add(data_set: DataSet, name: str, data: bytes, side: str = AUTO, limits: Limits = LIMITS) -> Added:
    """Add a file as the routes do."""
    data_set = open_data_set(data_set.root.parent, data_set.name)
    with received_file(data_set) as path, changing(data_set):
        path.write_bytes(data)
        return add_file(data_set, path, name, side, limits)


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", method) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return data.getvalue()


@pytest.fixture
def mine(tmp_path: Path) -> DataSet:
    (tmp_path / "in").mkdir()
    (tmp_path / "secret.txt").write_text("a secret")
    return create_data_set(tmp_path / "in", "mine")


# Pictures and captions


def test_added(mine: DataSet):
    assert add(mine, "cat_before.JPG", png(1, kind="JPEG")).added == [("cat.jpg", "reference")]
    assert add(mine, "cat_after.png", png(2)).added == [("cat.png", "target")]
    assert add(mine, "cat.txt", b"turn it <b>blue</b>").added == [("cat.txt", "target")]
    (pair,) = read_data_set(open_data_set(mine.root.parent, "mine")).pairs
    assert (pair.key, pair.caption) == ("cat", "turn it <b>blue</b>")
    assert (mine.root / "target" / "cat.png").read_bytes() == png(2)
    assert sorted(path.name for path in mine.root.iterdir()) == ["reference", "target"]


def test_equal_pictures_are_kept_once_and_others_get_a_number(mine: DataSet):
    for _ in range(2):
        assert add(mine, "a.png", png(1), "target").added == [("a.png", "target")]
    for _ in range(2):
        assert add(mine, "a.png", png(2), "target").added == [("a-2.png", "target")]
    assert add(mine, "A.jpg", png(3, kind="JPEG"), "target").added == [("A-3.jpg", "target")]
    assert (mine.root / "target" / "a.png").read_bytes() == png(1)
    assert add(mine, "A.png", png(4), "reference").added == [("a.png", "reference")]


def test_equal_pictures_of_two_pairs_are_both_kept(mine: DataSet):
    """Two edits of one picture. Names that only begin alike are no reason to drop one."""
    for name in ("10.png", "1.png", "1-2.png"):
        assert add(mine, name, png(1), "reference").added == [(name, "reference")]


def test_a_caption_replaces_no_other(mine: DataSet):
    assert add(mine, "a.txt", b"mine").problems == []
    assert "has another caption already" in add(mine, "a.txt", b"theirs").problems[0]
    assert add(mine, "a.txt", b"\xef\xbb\xbfmine\r\n").problems == []
    assert (mine.root / "target" / "a.txt").read_bytes() == b"mine\n"


def test_a_second_reference_makes_its_folder(mine: DataSet):
    assert add(mine, "a_ref2.png", png()).added == [("a.png", "reference_2")]
    assert list(open_data_set(mine.root.parent, "mine").sides) == ["reference", "reference_2", "target"]


def test_folders_that_someone_laid_out(tmp_path: Path):
    theirs = made(tmp_path, "a", before="Before", after="After")
    assert add(theirs, "b_before.png", png()).added == [("b.png", "reference")]
    assert (tmp_path / "mine" / "Before" / "b.png").is_file()
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["After", "Before"]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "BMP", "TIFF"])
def test_a_wrong_extension_is_corrected(kind: str, mine: DataSet):
    data = png(kind=kind)
    suffix = {"GIF": "gif", "WEBP": "webp", "BMP": "bmp", "TIFF": "tif"}[kind]
    assert add(mine, "a.png", data, "target").added == [(f"a.{suffix}", "target")]


def bomb(width: int = 30_000, height: int = 30_000) -> bytes:
    """A PNG whose header states a size that would fill the memory."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 1000)), (b"IEND", b"")]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def text_bomb() -> bytes:
    """A small picture whose text unpacks to far more."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("Comment", "x" * 3_000_000, zip=True)
    data = io.BytesIO()
    Image.new("RGB", (16, 12)).save(data, "PNG", pnginfo=texts)
    return data.getvalue()


REFUSED = {
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>',
    "html": b"<!doctype html><script>alert(1)</script>",
    "empty": b"",
    "cut short": png(size=(300, 300))[:-40],
    "zip": zipped({"a.png": png()}),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
    "large header": bomb(),
    "above the limit": bomb(9_000, 8_000),
    "pickle": b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x02os\x94\x8c\x06system\x94\x93\x94.",
    "narrow": png(size=(2000, 3)),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_files_that_are_no_good_pictures(kind: str, mine: DataSet, tmp_path: Path):
    before = files(tmp_path)
    found = add(mine, "../x/a.png", REFUSED[kind], "target")
    assert found.added == []
    assert found.problems[0].startswith("a.png: ")
    assert str(tmp_path) not in found.problems[0]
    assert files(tmp_path) == before


def test_odd_pictures_that_are_good(mine: DataSet):
    """A picture with a ZIP file behind it, one with a large text, and an animated one."""
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "blue")]
    animated = io.BytesIO()
    frames[0].save(animated, "GIF", save_all=True, append_images=frames[1:])
    for name, data in {"a": png() + zipped({"x": b"x"}), "b": text_bomb(), "c": animated.getvalue()}.items():
        assert add(mine, f"{name}.png", data, "target").problems == []
    assert sorted(path.name for path in (mine.root / "target").iterdir()) == ["a.png", "b.png", "c.gif"]


@pytest.mark.parametrize("data", [b"\xff\xfeh\0i\0", b"a\0b", b" \n", b"x" * 20_001, b"x" * 1_000_001, b"\xff"])
def test_texts_that_are_no_captions(data: bytes, mine: DataSet, tmp_path: Path):
    before = files(tmp_path)
    assert len(add(mine, "a.txt", data).problems) == 1
    assert files(tmp_path) == before


def test_limits_of_a_data_set(mine: DataSet, tmp_path: Path):
    add(mine, "a.png", png(1), "target")
    before = files(tmp_path)
    small = LIMITS._replace(set_bytes=len(png(1)) + 10)
    assert "the data set is full" in add(mine, "b.png", png(2), "target", small).problems[0]
    assert "the data set is full" in add(mine, "b.png", png(2), "target", LIMITS._replace(files=1)).problems[0]
    assert "larger than 10 bytes" in add(mine, "b.png", png(2), "target", LIMITS._replace(file_bytes=10)).problems[0]
    assert files(tmp_path) == before
    assert "trash" not in add(mine, "b.png", png(2), "target", LIMITS._replace(files=1)).problems[0]
    delete(mine, [("target", "a.png")])
    (problem,) = add(mine, "b.png", png(2), "target", LIMITS._replace(files=1)).problems
    assert f"Its trash has 1 file ({len(png(1))} bytes). Empty it in the side panel" in problem
    assert "other file" not in problem
    text(mine.root / TRASH / "own.txt", "not from a removal")
    (problem,) = add(mine, "b.png", png(2), "target", LIMITS._replace(files=1)).problems
    assert "Its trash has 1 file (" in problem and "Its folder .trash has 1 other file (18 bytes)." in problem
    (mine.root / TRASH / "own.txt").unlink()
    assert sorted(files(tmp_path).values()) == sorted(before.values())
    with pytest.raises(DatasetError, match="There is no side"):
        add(mine, "b.png", png(2), "../target")


def test_a_full_disk_is_our_own_error(mine: DataSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer_core.data_sets.adding.rename", full)
    before = files(tmp_path)
    with pytest.raises(DiskError, match="The disk is full"):
        add(mine, "a.png", png(), "target")
    assert files(tmp_path) == before


def test_a_target_folder_that_leads_out(mine: DataSet, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (mine.root / "reference_2").symlink_to(tmp_path / "out")
    with changing(mine), received_file(mine) as path:
        path.write_bytes(png())
        found = add_file(mine, path, "a_ref2.png")  # the link was made after the data set was opened
    assert found.added == []
    assert "reference_2 of the data set is a link" in found.problems[0]
    assert list((tmp_path / "out").iterdir()) == []
    with pytest.raises(DatasetError, match="is a link"):
        add(mine, "a_ref2.png", png())


# ZIP files


def test_a_zip_of_pairs(mine: DataSet):
    entries = {
        "my pairs/before/a.png": png(1),
        "my pairs/after/a.png": png(2),
        "my pairs/after/a.txt": b"turn it blue",
        "my pairs/before/s/b.png": png(3),
        "my pairs/after/s/b.png": png(4),
        "my pairs/readme.md": b"hello",
        "my pairs/.DS_Store": b"x",
    }
    found = add(mine, "all.zip", zipped(entries))
    assert found.problems == [
        "readme.md: this is not the extension of a picture that can be read. Convert it to PNG or JPEG."
    ]
    read = read_data_set(mine)
    assert [(pair.key, pair.caption) for pair in read.pairs] == [("a", "turn it blue"), ("s_b", "")]
    assert sorted(path.name for path in mine.root.iterdir()) == ["reference", "target"]


def test_a_zip_of_numbered_pairs(mine: DataSet):
    add(mine, "x.zip", zipped({f"{n:03d}_{side}.png": png(10 * n + side) for n in range(3) for side in (0, 1)}))
    assert [pair.key for pair in read_data_set(mine).pairs] == ["000", "001", "002"]
    assert (mine.root / "target" / "002.png").read_bytes() == png(21)


HOSTILE = [
    "../../evil_before.png",
    "/etc/evil_before.png",
    "C:\\Windows\\evil_before.png",
    "\\\\server\\share\\evil_before.png",
    "..\\..\\evil_before.png",
    "reference/../../evil_before.png",
    "~/evil_before.png",
    "nul_before.png",
    "a\x00_before.png",
    "<script>alert(1)</script>_before.png",
    "reference/.../evil.png",
]


def test_names_in_a_zip_lead_nowhere(mine: DataSet, tmp_path: Path):
    before = files(tmp_path)
    add(mine, "x.zip", zipped({name: png(number) for number, name in enumerate(HOSTILE)}))
    new = {name for name in files(tmp_path) if name not in before}
    assert new
    assert all(name.startswith("in/mine/reference/") and name.count("/") == 3 for name in new)
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before


def test_a_link_in_a_zip_is_no_link(mine: DataSet, tmp_path: Path):
    link = zipfile.ZipInfo("a_before.png")
    link.create_system, link.external_attr = 3, 0o120777 << 16
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr(link, "../../../secret.txt")
        archive.writestr("a_after.txt", "x")
    found = add(mine, "x.zip", data.getvalue())
    assert found.added == [("a.txt", "target")]
    assert not any(path.is_symlink() for path in tmp_path.rglob("*"))


def test_zip_bombs(mine: DataSet, tmp_path: Path):
    before = files(tmp_path)
    flat = b"\0" * 30_000_000
    nested = zipped({"inner.zip": zipped({"a_before.png": png()}), "b_before.png": flat})
    found = add(mine, "x.zip", nested)
    assert found.added == []
    assert [problem.split(":")[0] for problem in found.problems] == ["b_before.png", "inner.zip"]
    assert "300 times its size" in found.problems[0]
    limits = LIMITS._replace(file_bytes=1_000_000)
    assert "larger than 1.0 MB" in add(mine, "x.zip", zipped({"b_before.png": flat}), limits=limits).problems[0]
    lying = bytearray(zipped({"b_before.png": flat}))
    place = bytes(lying).rindex(b"PK\x01\x02") + 24
    lying[place : place + 4] = struct.pack("<I", 100)
    assert add(mine, "x.zip", bytes(lying)).added == []
    limits = LIMITS._replace(set_bytes=usage(mine.root).bytes + 40_000)
    many = zipped({f"{n}_before.png": png(n, (300, 300)) + bytes(9_000) for n in range(9)}, zipfile.ZIP_STORED)
    assert "because the data set is full" in add(mine, "x.zip", many, limits=limits).problems[-1]
    assert {name: data for name, data in files(tmp_path).items() if name in before} == before


def test_what_is_not_added_is_said_even_if_it_is_much(mine: DataSet):
    found = add(mine, "x.zip", zipped({f"{number:03d}.html": b"x" for number in range(150)}))
    assert len(found.problems) == 101
    assert found.problems[99].startswith("099.html: ")
    assert found.problems[100] == "More files were not added, for reasons like these."


def test_ten_thousand_files_in_a_zip(mine: DataSet, tmp_path: Path):
    entries = dict.fromkeys((f"{number}_before.png" for number in range(10_000)), b"")
    found = add(mine, "x.zip", zipped(entries, zipfile.ZIP_STORED), limits=LIMITS._replace(files=5_000))
    assert found.problems == ["The ZIP file has 10,000 files; at most 5,000 are added."]
    assert files(mine.root) == {}


def test_a_list_of_contents_that_would_fill_the_memory(mine: DataSet, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("trainer_core.data_sets.adding._DIRECTORY_BYTES", 100_000)
    entries = dict.fromkeys((f"{number}_before.png" for number in range(3_000)), b"")
    found = add(mine, "x.zip", zipped(entries, zipfile.ZIP_STORED))
    assert found.problems == ["The ZIP file lists too many files. Add the pictures in several ZIP files."]


# Its list of contents would begin before the file does.
LYING = b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, 1, 1, 1_000, 0, 0)


@pytest.mark.parametrize(
    "data", [b"", b"no zip", zipped({"a_before.png": png()})[:-30], b"PK\x05\x06" + b"\xff" * 18, LYING]
)
def test_damaged_zips(data: bytes, mine: DataSet):
    found = add(mine, "x.zip", data)
    assert found.added == []
    assert "damaged" in found.problems[0]


def test_damaged_and_encrypted_files_in_a_zip(mine: DataSet):
    data = bytearray(zipped({"a_before.png": png(), "b_before.png": png(2)}, zipfile.ZIP_STORED))
    data[data.index(b"IDAT") + 6] ^= 255
    for place in (data.rindex(b"PK\x01\x02") + 8, data.rindex(b"PK\x03\x04") + 6):
        data[place] |= 1
    found = add(mine, "x.zip", bytes(data))
    assert [problem.split(" ")[0] for problem in found.problems] == ["a_before.png:", "b_before.png:"]
    assert "damaged in the ZIP file" in found.problems[0]
    assert "encrypted" in found.problems[1]


def test_what_a_killed_upload_left_is_removed(mine: DataSet):
    name = temporary_beside(mine.root / "received").name
    dead, own = (mine.root / name.replace(f"-{os.getpid()}.", f"-{pid}.") for pid in (99_999_999, os.getpid()))
    for path in (dead, own):
        path.write_bytes(b"x")
    with changing(mine):
        assert [path.exists() for path in (dead, own)] == [False, True]
    assert usage(mine.root) == (1, 1)
