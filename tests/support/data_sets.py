"""Data sets for tests: folders of pairs below a root."""

from __future__ import annotations

from pathlib import Path

from tests.support.pair_files import contents, picture
from trainer_core.data_sets.folders import DataSet, open_data_set


def made(root: Path, *keys: str, before: str = "reference", after: str = "target", name: str = "mine") -> DataSet:
    """A data set with a pair for each key. All pictures differ."""
    for number, key in enumerate(keys):
        picture(root / name / before / f"{key}.jpg", seed=2 * number, size=(20, 10))
        picture(root / name / after / f"{key}.png", seed=2 * number + 1)
    for folder in (before, after):
        (root / name / folder).mkdir(parents=True, exist_ok=True)
    return open_data_set(root, name)


def files(root: Path) -> dict[str, bytes]:
    return {name: data for name, (data, _) in contents(root).items()}
