"""Folders whose sides are probably swapped are told apart from those that only look alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from trainer_core.config import DatasetConfig
from trainer_core.data.pairing import scan_folders

SAYS = "Are the two folders swapped?"


def folders(root: Path, target: str, reference: str, target_end: str = "", reference_end: str = "") -> DatasetConfig:
    """A dataset of two pairs in folders of these names. The names of its pictures have these endings."""
    for folder, end in ((target, target_end), (reference, reference_end)):
        (root / folder).mkdir()
        for number in (1, 2):
            Image.new("RGB", (64, 64), (90 * number, 40, 40)).save(root / folder / f"00{number}{end}.png")
    return DatasetConfig(
        target_dir=str(root / target),
        reference_dirs=(str(root / reference),),
        caption_strategy="instanceprompt",
        instance_prompt="make it blue",
    )


@pytest.mark.parametrize(
    ("names", "why"),
    [
        (("reference", "target"), "/reference and the references in "),
        (("Before", "After"), "/Before and the references in "),
        (("inputs", "output_1"), "/inputs and the references in "),
        (("a", "b", "_before", "_after"), "The targets are named like references (001_before, 002_before)"),
    ],
)
def test_swapped_sides_are_noticed(names: tuple[str, ...], why: str, tmp_path: Path):
    first = scan_folders(folders(tmp_path, *names)).notes[0]
    assert SAYS in first
    assert why in first


@pytest.mark.parametrize(
    "names",
    [("target", "reference"), ("after", "before"), ("a", "b"), ("target", "target_2"), ("a", "b", "_after", "_before")],
)
def test_other_folders_are_not(names: tuple[str, ...], tmp_path: Path):
    scan = scan_folders(folders(tmp_path, *names))
    assert not any(SAYS in text for text in (*scan.problems, *scan.notes))


def test_captions_beside_the_references_suggest_it(tmp_path: Path):
    config = folders(tmp_path, "a", "b")
    (tmp_path / "b" / "001.txt").write_text("make it blue")
    assert not any(SAYS in note for note in scan_folders(config).notes), "one text alone says nothing"
    (tmp_path / "b" / "002.txt").write_text("make it blue")
    assert scan_folders(config).notes[0].startswith("Captions lie beside the references (001, 002). " + SAYS)
