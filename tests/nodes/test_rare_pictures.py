"""In a real ComfyUI, pictures that Pillow reads wrongly or refuses are paired and told as on the command line."""

from __future__ import annotations

import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.support.comfyui_server import PackServer
from tests.support.picture_files import colours, png_chunk
from tests.support.training_graph import error_of, pairing
from trainer_core.config import DatasetConfig
from trainer_core.data.pairing import pair_folders, scan_folders
from trainer_core.errors import DatasetError
from trainer_core.pictures.contact_sheet import report

SIDE = 96
NFC, NFD = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))


def put(root: Path, key: str) -> None:
    for part in ("target", "reference_1"):
        (root / part).mkdir(parents=True, exist_ok=True)
        colours(SIDE, SIDE).save(root / part / f"{key}.png")
    (root / "target" / f"{key}.txt").write_text(f"brighten the picture {key}")


def with_a_transparent_part(path: Path) -> None:
    picture, alpha = colours(SIDE, SIDE), np.full((SIDE, SIDE), 255, np.uint8)
    alpha[:20] = 0
    picture.putalpha(Image.fromarray(alpha))
    picture.save(path)


def with_a_large_text(path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[:33] + png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(3_000_000))) + whole[33:])


def grey_of_16_bits() -> np.ndarray:
    return (np.arange(SIDE * SIDE).reshape(SIDE, SIDE) * 7).astype(np.uint16)


def with_16_bit_grey_that_means_transparent(path: Path) -> None:
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in grey_of_16_bits())
    body = png_chunk(b"IHDR", struct.pack(">IIBBBBB", SIDE, SIDE, 16, 0, 0, 0, 0))
    body += png_chunk(b"tRNS", struct.pack(">H", 7)) + png_chunk(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b""))


def with_white_as_zero(path: Path) -> None:
    path.unlink()
    path = path.with_suffix(".tif")
    Image.fromarray(grey_of_16_bits()).save(path)
    whole, tag = path.read_bytes(), struct.pack("<HHIH", 262, 3, 1, 1)
    assert whole.count(tag) == 1
    path.write_bytes(whole.replace(tag, struct.pack("<HHIH", 262, 3, 1, 0)))


def with_more_pixels_than_pillow_warns_of(path: Path) -> None:
    Image.new("L", (9600, 9600), 90).save(path)


RARE = {
    "transparent": with_a_transparent_part,
    "text": with_a_large_text,
    "grey": with_16_bit_grey_that_means_transparent,
    "zero": with_white_as_zero,
    "large": with_more_pixels_than_pillow_warns_of,
}


def settings(root: Path) -> DatasetConfig:
    return DatasetConfig(target_dir=str(root / "target"), reference_dirs=(str(root / "reference_1"),))


def test_rare_pictures_are_reported_as_on_the_command_line(comfyui: PackServer) -> None:
    root = comfyui.input / "rare"
    for key, change in RARE.items():
        put(root, key)
        change(root / "reference_1" / f"{key}.png")
    put(root, NFD)
    (root / "reference_1" / f"{NFD}.png").rename(root / "reference_1" / f"{NFC}.png")
    answer: dict[str, Any] = comfyui.run(pairing("rare"))
    dataset = pair_folders(settings(root))
    assert len(dataset.pairs) == len(RARE) + 1
    assert answer["preview"]["text"][0] == report(dataset)
    (note,) = dataset.notes
    assert note.startswith("Pictures with transparent parts: 2 (reference_1/grey.png, reference_1/transparent.png).")
    assert "DecompressionBomb" not in comfyui.log.read_text(errors="replace")


def test_problems_come_with_the_files_that_are_not_used(comfyui: PackServer) -> None:
    root = comfyui.input / "twins"
    for key in ("a", NFC, NFD):
        put(root, key)
    (root / "target" / "a.txt").write_text("\u200b\u2060\n\ufeff")
    (root / "reference_1" / "b.heic").write_bytes(b"x")
    with pytest.raises(DatasetError) as caught:
        pair_folders(settings(root))
    assert len(caught.value.problems) == 4 and len(caught.value.notes) == 1
    assert sum("has no visible character" in each for each in scan_folders(settings(root)).problems) == 1
    error = error_of(comfyui.wait(comfyui.queue(pairing("twins"))))
    assert error["exception_message"].strip() == str(caught.value).replace(f"{comfyui.base}/", "")
    assert "1 .heic file not used (b.heic)" in error["exception_message"]
