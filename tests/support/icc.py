"""Colour profiles (ICC) for tests, and pictures whose numbers mean the same colours under another profile."""

from __future__ import annotations

import struct

import numpy as np
from PIL import Image

D50 = (0.9642, 1.0, 0.8249)
D65 = (0.9505, 1.0, 1.0891)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
PRIMARIES = {  # x, y of red, green and blue; all with D65
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Display P3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}


def linear(values: np.ndarray, space: str) -> np.ndarray:
    """The light of values in 0..1."""
    if space == "Adobe RGB":
        return values**2.19921875
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def encoded(light: np.ndarray, space: str) -> np.ndarray:
    """The inverse of `linear`."""
    light = light.clip(0, 1)
    if space == "Adobe RGB":
        return light ** (1 / 2.19921875)
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def matrix(space: str) -> np.ndarray:
    """From light of red, green and blue to XYZ under D65."""
    columns = np.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[space]]).T
    return columns * np.linalg.solve(columns, D65)


def in_space(picture: Image.Image, space: str) -> Image.Image:
    """The numbers that the colours of an sRGB picture have in another space."""
    light = linear(np.asarray(picture) / 255, "sRGB") @ (np.linalg.inv(matrix(space)) @ matrix("sRGB")).T
    return Image.fromarray((encoded(light, space) * 255).round().astype(np.uint8))


def _fixed(*numbers: float) -> bytes:
    return b"".join(struct.pack(">i", round(number * 65536)) for number in numbers)


def _curve(space: str) -> bytes:
    table = (linear(np.linspace(0, 1, 4096), space) * 65535).round().astype(">u2")
    return b"curv" + bytes(4) + struct.pack(">I", len(table)) + table.tobytes()


def profile(name: str, kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    """An ICC profile of version 2.4 with these tags."""
    text = name.encode()
    description = b"desc" + bytes(4) + struct.pack(">I", len(text) + 1) + text + bytes(1 + 4 + 4 + 2 + 1 + 67)
    tags = {b"desc": description, b"wtpt": b"XYZ " + bytes(4) + _fixed(*D50), **tags}
    body, table, offset = b"", struct.pack(">I", len(tags)), 132 + 12 * len(tags)
    for key, data in tags.items():
        table += key + struct.pack(">II", offset + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    head = struct.pack(">I4sI4s4s4s", offset + len(body), bytes(4), 0x02400000, kind, space, connection)
    head += struct.pack(">6H4s", 2026, 1, 1, 0, 0, 0, b"acsp") + bytes(28) + _fixed(*D50) + bytes(48)
    return head + table + body


def rgb_profile(space: str, name: str = "") -> bytes:
    """The profile of one of the `PRIMARIES`."""
    response, white = BRADFORD @ matrix(space), BRADFORD @ np.array(D65)
    adapted = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ np.array(D50) / white) @ response
    tags = {
        key: b"XYZ " + bytes(4) + _fixed(*column)
        for key, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), adapted.T, strict=True)
    }
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(space))
    return profile(name or space, b"mntr", b"RGB ", b"XYZ ", tags)


def grey_profile(gamma: float) -> bytes:
    """The profile of grey with this gamma."""
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256)) + bytes(2)
    return profile(f"Gray Gamma {gamma}", b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def cmyk_profile() -> bytes:
    """A profile in which each ink alone is black: the lightness falls linearly with the ink."""
    lightness = [0 if c + m + y + k else 255 for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)]
    colours, same = b"".join(bytes((each, 128, 128)) for each in lightness), bytes(range(256))
    table = b"mft1" + bytes(4) + bytes((4, 3, 2, 0)) + _fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
    return profile("Grey inks", b"prtr", b"CMYK", b"Lab ", {b"A2B0": table + same * 4 + colours + same * 3})


def in_srgb(picture: Image.Image, space: str) -> np.ndarray:
    """The sRGB numbers, 0 to 255, of a picture whose numbers are of another space."""
    light = linear(np.asarray(picture) / 255, space) @ (np.linalg.inv(matrix("sRGB")) @ matrix(space)).T
    return encoded(light, "sRGB") * 255
