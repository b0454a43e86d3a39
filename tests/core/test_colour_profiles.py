"""Pictures with a colour profile are converted to sRGB wherever they are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageCms, PngImagePlugin, features

from tests.support.icc import PRIMARIES, cmyk_profile, encoded, grey_profile, in_space, in_srgb, rgb_profile
from tests.support.pair_files import config, contents
from tests.support.picture_files import decoded, png_chunk
from trainer_core.conditioning.encoding_plan import LatentTask, plan_encoding
from trainer_core.config import EncodingConfig, ModelConfig, PairCheckConfig
from trainer_core.data.colour_profiles import ColourProfile, colour_profile, to_srgb
from trainer_core.data.images import open_picture
from trainer_core.data.pair_check import measure_pair
from trainer_core.data.pairing import EditDataset, pair_folders, scan_folders
from trainer_core.pictures.contact_sheet import report
from trainer_core.pictures.rows import open_thumbnail

OTHERS = ("Display P3", "Adobe RGB")


def photograph(size: int = 64) -> Image.Image:
    """Smooth colours of all hues, no channel below 70."""
    y, x = np.mgrid[0:size, 0:size] / size
    waves = np.stack([np.sin(6 * x + 2 * y), np.sin(5 * y + 1), np.sin(7 * x * y + 3)], -1)
    return Image.fromarray((150 + 80 * waves).astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture).astype(float)


def pair(root: Path, key: str, space: str = "sRGB", *, suffix: str = ".png") -> None:
    """An sRGB target without a profile, and a reference with the same colours in another space."""
    for folder in ("after", "before"):
        (root / folder).mkdir(exist_ok=True)
    photograph().save(root / "after" / f"{key}.png")
    (root / "after" / f"{key}.txt").write_text("Make it blue.")
    exact = {"quality": 100, "subsampling": 0} if suffix == ".jpg" else {}
    in_space(photograph(), space).save(root / "before" / f"{key}{suffix}", icc_profile=rgb_profile(space), **exact)


@pytest.mark.parametrize("space", OTHERS)
def test_a_reference_has_the_colours_of_its_target_again(tmp_path: Path, space: str) -> None:
    pair(tmp_path, "a", space)
    raw = open_picture(tmp_path / "before/a.png", convert=False)
    assert np.abs(pixels(raw) - pixels(photograph())).mean() > 5
    difference = np.abs(pixels(open_picture(tmp_path / "before/a.png")) - pixels(photograph()))
    assert difference.max() <= 2
    assert difference.mean() < 0.4


@pytest.mark.parametrize("space", PRIMARIES)
def test_every_colour_is_converted_as_computed_in_float(space: str) -> None:
    every = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8))
    difference = np.abs(pixels(to_srgb(every, rgb_profile(space))) - in_srgb(every, space))
    assert difference.mean() < 0.4
    assert np.quantile(difference, 0.99) <= 1
    assert difference.max() <= 4


@pytest.mark.parametrize(("gamma", "most"), [(1.8, 2), (2.2, 1.5)])
def test_grey_is_converted(gamma: float, most: float) -> None:
    ramp = np.arange(256, dtype=np.uint8)
    found = pixels(to_srgb(Image.fromarray(ramp[None]), grey_profile(gamma)))[0]
    assert np.abs(found - 255 * encoded((ramp / 255) ** gamma, "sRGB")[:, None]).max() <= most


@pytest.mark.parametrize("suffix", [".tif", ".jpg"])
def test_ink_is_converted_by_its_profile_and_without_one_as_pillow_does(tmp_path: Path, suffix: str) -> None:
    inks = [(0, 0, 0, 0), (128, 0, 0, 0), (0, 255, 0, 0), (0, 0, 0, 255)]
    picture = Image.new("CMYK", (64, 16))
    for number, ink in enumerate(inks):
        picture.paste(ink, (16 * number, 0, 16 * number + 16, 16))
    picture.save(tmp_path / f"with{suffix}", icc_profile=cmyk_profile(), quality=100)
    picture.save(tmp_path / f"without{suffix}", quality=100)
    found = pixels(open_picture(tmp_path / f"with{suffix}"))[8, 8::16]
    assert np.abs(found - np.array([255, 118.5, 0, 0])[:, None]).max() <= 2  # L* 49.8 is 118.5 in sRGB
    plain = pixels(open_picture(tmp_path / f"without{suffix}"))[8, 8::16]
    assert np.abs(plain - [(255, 255, 255), (127, 255, 255), (255, 0, 255), (0, 0, 0)]).max() <= 2


def test_srgb_is_known_by_what_it_does_and_not_by_its_name() -> None:
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert colour_profile(own, "RGB") is None
    assert colour_profile(own, "L") is None
    assert colour_profile(rgb_profile("sRGB", "Monitor 7"), "RGB") is None
    assert colour_profile(rgb_profile("Display P3", "sRGB IEC61966-2.1"), "RGB") == ("sRGB IEC61966-2.1", "")
    assert colour_profile(None, "RGB") is None
    assert colour_profile(b"junk", "RGB") == ColourProfile("a profile without a name", "it is damaged")


@pytest.mark.parametrize(
    "icc",
    [b"junk", rgb_profile("Display P3")[:300], cmyk_profile(), grey_profile(2.2)],
    ids=["junk", "cut", "cmyk", "grey"],
)
@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
def test_a_profile_that_can_not_be_used_leaves_the_numbers_and_is_noted(
    tmp_path: Path, icc: bytes, suffix: str
) -> None:
    pair(tmp_path, "a")
    (tmp_path / "before/a.png").unlink()
    path = tmp_path / f"before/a{suffix}"
    photograph().save(path, icc_profile=icc, **({"lossless": True} if suffix == ".webp" else {}))
    assert (pixels(open_picture(path)) == pixels(photograph())).all()
    dataset = pair_folders(config(tmp_path))
    assert sum("can't be used" in note and f"before/a{suffix}" in note for note in dataset.notes) == 1
    assert "+" not in dataset.pairs[0].digests[1]


def test_the_colours_below_and_the_edges_of_transparency_are_converted(tmp_path: Path) -> None:
    raw, alpha = in_space(photograph(), "Display P3"), Image.new("L", (64, 64), 255)
    alpha.paste(0, (0, 0, 20, 64))
    alpha.paste(128, (20, 0, 40, 64))
    raw.putalpha(alpha)
    raw.save(tmp_path / "a.png", icc_profile=rgb_profile("Display P3"))
    share = pixels(alpha)[..., None] / 255
    expected = pixels(photograph()) * share + 255 * (1 - share)
    assert np.abs(pixels(open_picture(tmp_path / "a.png")) - expected).max() <= 2.5


def test_a_profile_above_pillows_limit_is_read(tmp_path: Path) -> None:
    large = rgb_profile("Display P3") + np.random.default_rng(0).bytes(1_500_000)
    large = len(large).to_bytes(4, "big") + large[4:]
    in_space(photograph(), "Display P3").save(tmp_path / "a.png", icc_profile=large)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"), Image.open(tmp_path / "a.png") as opened:
        opened.load()
    assert len(large) > PngImagePlugin.MAX_TEXT_CHUNK
    assert np.abs(pixels(open_picture(tmp_path / "a.png")) - pixels(photograph())).max() <= 2


def test_the_notes_count_what_was_converted_and_name_the_pairs_that_differ(tmp_path: Path) -> None:
    pair(tmp_path, "plain")
    pair(tmp_path, "p3", "Display P3")
    pair(tmp_path, "p3_too", "Display P3", suffix=".jpg")
    pair(tmp_path, "adobe", "Adobe RGB")
    before = contents(tmp_path)
    dataset = pair_folders(config(tmp_path), checked_dir=tmp_path.parent / "checked")
    expected = [
        "Pictures converted from Adobe RGB to sRGB: 1 (before/adobe.png).",
        "Pictures converted from Display P3 to sRGB: 2 (before/p3.png, before/p3_too.jpg).",
        "Pairs whose target and references have different colour profiles: 3 (adobe, p3, p3_too). With color_profiles "
        "convert, all become sRGB; with ignore, the difference in colour is learned.",
    ]
    assert list(dataset.notes) == expected
    assert all(note in report(dataset) for note in expected)
    raw = pair_folders(config(tmp_path, color_profiles="ignore"), checked_dir=tmp_path.parent / "checked")
    assert raw.notes[1] == (
        "Pictures in Display P3 that are not converted to sRGB, because color_profiles is ignore: 2 (before/p3.png, "
        "before/p3_too.jpg)."
    )
    assert raw.fingerprint != dataset.fingerprint
    assert contents(tmp_path) == before


def keys(dataset: EditDataset) -> dict[str, tuple[str, ...]]:
    """All cache keys of each pair."""
    model, encoding = ModelConfig(flavour="edit-v2"), EncodingConfig(resolution=64)
    planned = [plan_encoding(pair, model, encoding, ("vae", "text"), validated=False) for pair in dataset.pairs]
    return {each.pair.key: (each.entry.target, *each.entry.references, *each.entry.prompts) for each in planned}


def test_cache_keys_differ_only_where_the_pixels_do(tmp_path: Path) -> None:
    pair(tmp_path, "plain")
    pair(tmp_path, "other", "Adobe RGB")
    converted, raw = (
        keys(scan_folders(config(tmp_path, color_profiles=each)).dataset) for each in ("convert", "ignore")
    )
    assert converted["plain"] == raw["plain"]
    assert [a == b for a, b in zip(converted["other"], raw["other"], strict=True)] == [True, False, False]


@pytest.mark.parametrize("color_profiles", ["convert", "ignore"])
def test_everything_that_opens_a_pair_reads_the_same_colours(tmp_path: Path, color_profiles: str) -> None:
    pair(tmp_path, "a", "Adobe RGB")
    dataset = pair_folders(config(tmp_path, color_profiles=color_profiles))
    target, reference = photograph(), open_picture(tmp_path / "before/a.png", convert=color_profiles == "convert")
    model, encoding = (
        ModelConfig(flavour="edit-v2"),
        EncodingConfig(resolution=64, match_target_res=True),
    )
    planned = plan_encoding(dataset.pairs[0], model, encoding, ("vae", "text"), validated=False)
    read = [task.read().permute(1, 2, 0).numpy() * 255 for task in planned.latent_tasks()]
    assert all(isinstance(task, LatentTask) for task in planned.latent_tasks())
    assert np.abs(read[0] - pixels(target)).max() <= 0.01
    assert np.abs(read[1] - pixels(reference)).max() <= 0.01
    offset = max(map(abs, measure_pair(dataset.pairs[0], PairCheckConfig()).alignments[0].colour))
    assert (offset < 0.5) == (color_profiles == "convert")
    thumbnail = pixels(open_thumbnail(tmp_path / "before/a.png", convert=color_profiles == "convert"))
    assert (thumbnail == pixels(reference)).all()


def test_results_of_the_check_are_kept_with_the_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pair(tmp_path, "a", "Display P3")
    monkeypatch.setattr("trainer_core.data.checking._SETTLED_NS", 0)
    first = pair_folders(config(tmp_path), checked_dir=tmp_path / "checked")
    monkeypatch.setattr("trainer_core.data.checking.decode_picture", None)
    assert pair_folders(config(tmp_path), checked_dir=tmp_path / "checked") == first
    raw = pair_folders(config(tmp_path, color_profiles="ignore"), checked_dir=tmp_path / "checked")
    assert dataclasses.replace(raw.pairs[0], digests=()) == dataclasses.replace(first.pairs[0], digests=())
    assert first.pairs[0].digests == (raw.pairs[0].digests[0], raw.pairs[0].digests[1] + "+srgb")


def test_without_littlecms_the_numbers_are_kept_and_the_note_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImageCms, "ImageCmsProfile", lambda _file: (_ for _ in ()).throw(ImportError("no _imagingcms")))
    icc = rgb_profile("Display P3", "yet another")
    assert colour_profile(icc, "RGB") == ColourProfile(
        "a profile without a name", "the installed Pillow has no littlecms"
    )
    in_space(photograph(), "Display P3").save(tmp_path / "a.png", icc_profile=icc)
    assert (pixels(open_picture(tmp_path / "a.png")) == pixels(in_space(photograph(), "Display P3"))).all()


def test_a_space_that_is_only_stated_is_noted_and_its_pairs_are_named(tmp_path: Path) -> None:
    """The file has no profile to convert with: a camera's Adobe RGB in EXIF, or gamma and primaries of a PNG."""
    for key in ("camera", "coded", "mac", "primaries", "plain"):
        pair(tmp_path, key)
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.ColorSpace] = 65535
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.IFD.Interop] = {1: "R03"}
    (tmp_path / "before/camera.png").unlink()
    photograph().save(tmp_path / "before/camera.jpg", exif=exif, quality=95)
    for key, chunks in {
        "coded": [(b"cICP", bytes((12, 13, 0, 1)))],  # Display P3
        "mac": [(b"gAMA", (55556).to_bytes(4, "big"))],
        "primaries": [chromaticities("Display P3")],
        "plain": [(b"gAMA", (45455).to_bytes(4, "big")), chromaticities("sRGB"), (b"cICP", bytes((1, 13, 0, 1)))],
    }.items():
        photograph().save(tmp_path / f"before/{key}.png")
        whole = (tmp_path / f"before/{key}.png").read_bytes()
        inserted = b"".join(png_chunk(*each) for each in chunks)
        (tmp_path / f"before/{key}.png").write_bytes(whole[:33] + inserted + whole[33:])
    dataset = pair_folders(config(tmp_path))
    assert [note.partition(":")[0] for note in dataset.notes] == [
        "Pictures with a colour profile that can't be used (EXIF only states Adobe RGB)",
        "Pictures with a colour profile that can't be used (the file only states primaries 12 and transfer function 13 "
        "of H.273)",
        "Pictures with a colour profile that can't be used (the PNG only states the gamma 0.556)",
        "Pictures with a colour profile that can't be used (the PNG only states its primaries)",
        "Pairs whose target and references have different colour profiles",
    ]
    assert "4 (camera, coded, mac, …)" in dataset.notes[-1]
    assert "+" not in "".join(digest for each in dataset.pairs for digest in each.digests)


def chromaticities(space: str) -> tuple[bytes, bytes]:
    """Kind and data of a PNG's cHRM chunk."""
    points = ((0.3127, 0.329), *PRIMARIES[space])
    return b"cHRM", b"".join(round(part * 100_000).to_bytes(4, "big") for point in points for part in point)


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow can't write AVIF")
@pytest.mark.parametrize(("primaries", "noted"), [(1, False), (12, True)])
def test_an_avif_that_states_its_space_by_numbers_is_noted(tmp_path: Path, primaries: int, noted: bool) -> None:
    photograph().save(tmp_path / "a.avif")
    whole = (tmp_path / "a.avif").read_bytes()
    assert whole.count(b"colrnclx\0\x01\0\x0d") == 1
    (tmp_path / "a.avif").write_bytes(whole.replace(b"colrnclx\0\x01", b"colrnclx\0" + bytes((primaries,))))
    found = decoded(tmp_path / "a.avif").profile
    words = "the file only states primaries 12 and transfer function 13 of H.273"
    assert found == (ColourProfile("a space of its own", words) if noted else None)
