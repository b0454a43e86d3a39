"""A folder with all known kinds of trouble gives one readable report, and no file is changed."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from tests.support.pair_files import config, contents, pair, picture, problems_of, text
from trainer_core.data.pairing import pair_folders, scan_folders

LONG = f"{'folder with a long name,' * 6}/{'and one more below it,' * 7}/{'x' * 240}"  # 540 characters, 240 in one part


def frames(path: Path, kind: str) -> None:
    """Saves an animation of three frames."""
    colours = [Image.new("RGB", (16, 12), colour) for colour in ("red", "green", "blue")]
    colours[0].save(path, kind, save_all=True, append_images=colours[1:])


# Path below the folder, with slashes after it to tell keys apart -> part of the message.
PROBLEMS = {
    "after/zero.png": "is empty (0 bytes)",
    "after/cut_png.png": "damaged or cut short",
    "before/cut_jpg.jpg": "damaged or cut short",
    "before/words.png": "damaged or not a supported picture",
    "after/alone.png": "there is no reference (picture before the edit) for it in",
    "after/mute.png": "looked for mute.txt",
    "before/linked.png": "the link points outside the dataset's folder",
    "after/linked.png": "there is no reference (picture before the edit) for it in",
    "after/chain.txt": "can't be reached",
    "after/chain.png": "looked for chain.txt",
    "after/twice.png": "same name except for the extension",
    "before/huge.png": "at most 178 million",
    "after": "look like masks of targets: 2 (animated_mask.png, good-masklabel.png). Move them to a folder",
}
NOTES = {
    "after": "1 .psd file not used (layers.psd), because this format is not supported. Convert",
    "after/": "2 .heic files not used (phone.heic, phone_too.HEIC)",
    "after//": "1 .xlsx file not used (list.xlsx), because this is not the extension of a picture",
    "after///": "hidden and system files and folders not used: 3 (@eaDir, Thumbs.db, __MACOSX)",
    "before": "1 text not used (words.txt), because captions are read beside the targets",
    "before/": "1 picture not used (nobody.png), because no target has this name",
}


def hostile(root: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Makes the folders. Returns the expected problems and the expected notes: relative path -> part of the message."""
    after, before = root / "after", root / "before"
    for key in ("good", "zero", "cut_png", "cut_jpg", "words", "alone", "mute", "linked", "chain", "twice", "huge"):
        pair(root, key)
    for key in ("large", "animated", "loop", "disguised", LONG):
        pair(root, key)
    text(after / "zero.png", b"")
    Image.effect_noise((64, 64), 90).save(after / "cut_png.png")
    text(after / "cut_png.png", (after / "cut_png.png").read_bytes()[:900])
    (before / "cut_jpg.png").unlink()
    Image.effect_noise((64, 64), 90).save(before / "cut_jpg.jpg")
    text(before / "cut_jpg.jpg", (before / "cut_jpg.jpg").read_bytes()[:-400])
    text(before / "words.png", "I am a text")
    (before / "alone.png").unlink()
    (after / "mute.txt").unlink()
    secret = picture(root / "elsewhere/secret.png")
    (before / "linked.png").unlink()
    (before / "linked.png").symlink_to(secret)
    (after / "chain.txt").unlink()
    (after / "chain.txt").symlink_to(root / "elsewhere" / "chain.txt")
    picture(after / "twice.jpg")
    Image.new("1", (14_000, 14_000)).save(before / "huge.png")
    Image.new("1", (10_000, 10_000)).save(after / "large.png")
    frames(after / "animated.png", "PNG")
    frames(before / "loop.png", "GIF")
    text(after / "layers.psd", b"8BPS")
    text(after / "phone.heic", b"x")
    text(after / "phone_too.HEIC", b"x")
    text(after / "list.xlsx", b"x")
    text(before / "words.txt", "captions belong beside targets")
    picture(after / "@eaDir/good.png/SYNOPHOTO_THUMB_M.jpg")
    picture(after / "__MACOSX/._good.png")
    text(after / "Thumbs.db", b"x")
    picture(after / "good-masklabel.png")
    picture(after / "animated_mask.png")
    Image.new("RGB", (16, 12), "red").save(after / "disguised.png", "JPEG")
    picture(before / "nobody.png")
    return PROBLEMS, NOTES


def test_a_hostile_folder_gives_one_readable_report_and_changes_nothing(tmp_path: Path) -> None:
    expected, noted = hostile(tmp_path)
    untouched = contents(tmp_path)
    problems = problems_of(config(tmp_path))
    for name, words in expected.items():
        assert sum(line.startswith(f"{tmp_path / name}: ") and words in line for line in problems) == 1, (
            name,
            problems,
        )
    assert len(problems) == len(expected)
    assert all(line.isprintable() and line.endswith(".") and len(line) < 900 for line in problems)

    scan = scan_folders(config(tmp_path))
    assert list(scan.problems) == problems
    for name, words in noted.items():
        assert sum(line.startswith(f"{tmp_path / name.rstrip('/')}: ") and words in line for line in scan.notes) == 1, (
            name
        )
    frames = "Pictures with several frames: 2 (after/animated.png, before/loop.png). Only the first frame is used."
    assert scan.notes[-1] == frames and len(scan.notes) == len(noted) + 1
    good = {each.key: each for each in scan.dataset.pairs}
    assert set(good) == {"good", "twice", "large", "animated", "loop", "disguised", LONG}
    assert good["large"].sizes[0] == (10_000, 10_000)
    assert contents(tmp_path) == untouched


def test_what_was_listed_can_be_mended(tmp_path: Path) -> None:
    expected, _ = hostile(tmp_path)
    for path in [*map(tmp_path.joinpath, expected), *(tmp_path / "after").glob("*[-_]mask*")]:
        for twin in (*path.parent.parent.glob(f"*/{path.stem}.*"),):
            twin.unlink()
    assert {each.key for each in pair_folders(config(tmp_path)).pairs} == {
        "good",
        "large",
        "animated",
        "loop",
        "disguised",
        LONG,
    }
