"""Convert pictures to sRGB by the colour profile (ICC) in their file, with littlecms through Pillow."""

from __future__ import annotations

import io
import re
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import ExifTags, Image

if TYPE_CHECKING:  # loaded when it is needed, because ComfyUI doesn't load it
    from PIL.ImageCms import ImageCmsProfile, ImageCmsTransform

_SAME = 2  # of 255: the largest difference between sRGB and a profile that counts as sRGB
_SAME_GAMMA = 0.02
_SRGB_PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # x, y of white, red, green and blue
STATED_WITHIN = 65_536  # first bytes of a file that are searched for such a statement
_CODED = re.compile(rb"\0\0\0\x04cICP(.)(.)|\0\0\0\x13colrnclx\0(.)\0(.)", re.DOTALL)  # of a PNG, of an AVIF
_SRGB_CODES = (1, 2, 6, 13)  # of primaries: BT.709, unknown, BT.601; of transfer functions also sRGB
_INTEROPERABILITY = 1  # EXIF tag: R03 says that a camera wrote Adobe RGB
_SPACES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # a profile's colour space and Pillow's mode for it


class ColourProfile(NamedTuple):
    """A file's colour profile that is not sRGB. `problem`: why it can't be used; empty if it can."""

    name: str
    problem: str = ""


def colour_profile(icc: object, mode: str) -> ColourProfile | None:
    """The profile `icc` of a picture in this mode (L, RGB or CMYK); None for no profile and for sRGB.

    A profile counts as sRGB by what it does to colours, not by its name.
    """
    return None if not icc else _loaded(icc if isinstance(icc, bytes) else b"", mode).profile


def stated_space(picture: Image.Image, start: bytes) -> ColourProfile | None:
    """A colour space other than sRGB that a file without a profile states in another way; None if it states none.

    It may be in EXIF, in a PNG's gamma or primaries, or in a PNG's or AVIF's numbers of H.273. `start`: the file's
    first `STATED_WITHIN` bytes.
    """
    if coded := _CODED.search(start):
        primaries, transfer = (part[0] for part in coded.groups() if part is not None)
        if primaries not in _SRGB_CODES or transfer not in _SRGB_CODES:
            numbers = f"primaries {primaries} and transfer function {transfer} of H.273"
            return ColourProfile("a space of its own", f"the file only states {numbers}")
        return None
    if "srgb" in picture.info:
        return None
    gamma, primaries = picture.info.get("gamma"), picture.info.get("chromaticity")
    if isinstance(gamma, float) and abs(gamma - 1 / 2.2) > _SAME_GAMMA:
        return ColourProfile("a space of its own", f"the PNG only states the gamma {gamma:.3f}")
    if isinstance(primaries, tuple) and np.abs(np.subtract(primaries, _SRGB_PRIMARIES)).max() > _SAME_GAMMA:
        return ColourProfile("a space of its own", "the PNG only states its primaries")
    try:
        index = picture.getexif().get_ifd(ExifTags.IFD.Interop).get(_INTEROPERABILITY) if "exif" in picture.info else ""
    except Exception:  # noqa: BLE001 - damaged EXIF raises almost anything, and the picture can be read without it
        return None
    return ColourProfile("Adobe RGB", "EXIF only states Adobe RGB") if str(index).startswith("R03") else None


def to_srgb(picture: Image.Image, icc: bytes) -> Image.Image:
    """The picture (L, RGB or CMYK) as RGB in sRGB. `colour_profile` must have found no problem with this profile."""
    loaded = _loaded(icc, picture.mode)
    assert loaded.transform is not None
    return loaded.transform.apply(picture if picture.mode == loaded.mode else picture.convert(loaded.mode))


class _Loaded(NamedTuple):
    """A profile, None if it is sRGB, and the conversion from `mode` to sRGB."""

    profile: ColourProfile | None
    mode: str = ""
    transform: ImageCmsTransform | None = None


@lru_cache(maxsize=8)  # few, because a profile may have megabytes
def _loaded(icc: bytes, mode: str) -> _Loaded:
    from PIL import ImageCms

    name = "a profile without a name"
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        name = _name(profile) or name
        wanted = _SPACES.get(profile.profile.xcolor_space.strip(), "")
        if wanted != mode and (wanted, mode) != ("RGB", "L"):
            return _Loaded(
                ColourProfile(name, f"it is for {profile.profile.xcolor_space.strip()}, the picture is {mode}")
            )
        transform = _transform(profile, wanted)
    except ImportError:
        return _Loaded(ColourProfile(name, "the installed Pillow has no littlecms"))
    except Exception:  # noqa: BLE001 - damaged profiles raise almost anything
        return _Loaded(ColourProfile(name, "it is damaged"))
    colours = _samples(mode)
    found = np.asarray(transform.apply(colours.convert(wanted)), dtype=np.int16)
    same = np.abs(found - np.asarray(colours.convert("RGB"), dtype=np.int16)).max() <= _SAME
    return _Loaded(None if same else ColourProfile(name), wanted, transform)


def _transform(profile: ImageCmsProfile, mode: str) -> ImageCmsTransform:
    """Perceptual if the profile supports it, else relative colorimetric. Black becomes black."""
    from PIL import ImageCms

    perceptual = profile.profile.is_intent_supported(ImageCms.Intent.PERCEPTUAL, ImageCms.Direction.INPUT)
    intent = ImageCms.Intent.PERCEPTUAL if perceptual else ImageCms.Intent.RELATIVE_COLORIMETRIC
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB", intent, flags)


def _samples(mode: str) -> Image.Image:
    """A picture of colours from all over the range of this mode."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    if mode == "L":
        return Image.fromarray(levels[None])
    grid = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(len(levels), -1, 3)
    return Image.fromarray(grid).convert(mode)


def _name(profile: ImageCmsProfile) -> str:
    from PIL import ImageCms

    text = " ".join(ImageCms.getProfileDescription(profile).split())
    return "".join(letter for letter in text if letter.isprintable())[:60]
