"""Uses a data set: its pairs for encoding, with the held-out ones marked, and the findings of the checks."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from pathlib import Path

from ..config import DatasetConfig, PairCheckConfig, digest
from ..data.captions import read_caption_file
from ..data.folders import Folder, scan_folder, unread_names
from ..data.pair_check import check_pairs
from ..data.pairing import EditDataset, EditPair, folder_state, scan_folders
from ..data.sides import captions_beside_references
from ..errors import DatasetError
from ..events import SILENT, Observer
from ..text import brief, counted, is_blank, shown, some_of, to_fix
from .folders import DataSet, open_data_set
from .reading import held_out_and_notes, read_held_out

_DEMO = Path(__file__).parent.parent / "demo" / "pairs"
_MOST_NOTES = 100


def demo_data_set() -> DataSet:
    """The pairs that ship with the demo model.

    Raises:
        NotFoundError: they are not installed.
    """
    return open_data_set(_DEMO.parent, _DEMO.name)


def state_of(data_set: DataSet, instruction: str) -> str:
    """A digest that changes when `pairs_of` may have another result. Opens no picture.

    Raises:
        DiskError: a name is too long, or the disk fails.
    """
    held_out, notes = held_out_and_notes(data_set)
    return digest([folder_state(_config(data_set, instruction)), sorted(held_out), notes])


def pairs_of(
    data_set: DataSet, instruction: str, observer: Observer = SILENT, *, checked_dir: Path | None = None
) -> EditDataset:
    """The pairs of a data set, every picture checked. `instruction` is the caption of all; blank: each pair's own.

    Raises:
        DatasetError: pictures, partners or captions are missing or can't be used; lists all problems.
        DiskError: a name is too long, or the disk fails.
        Interrupted: the observer asked to stop.
    """
    target = scan_folder(data_set.folder("target"), observer=observer)
    reference = scan_folder(data_set.folder("reference"), observer=observer)
    name = brief(data_set.name)
    if not target.pictures.keys() & reference.pictures.keys():
        wrong = [*target.problems, *reference.problems]
        raise DatasetError(f"The data set {name} {_why_no_pair(target, reference)}", wrong)
    problems: list[str] = []
    is_swapped = False
    marked: frozenset[str] = frozenset()
    try:
        marked = read_held_out(data_set)
    except DatasetError as error:
        problems.append(str(error))
    if is_blank(instruction):
        without = sorted(target.pictures.keys() - target.texts.keys())
        if without:
            if is_swapped := captions_beside_references(target, reference):
                said = (
                    "Before and after look swapped: the instructions are beside the pictures before the edit "
                    f"({some_of(without)})."
                )
                advice = "If so, press Swap all in the side panel Edit pairs. If not, write there what the edit does"
            else:
                said = f"{counted(len(without), 'pair')} without an instruction ({some_of(without)})."
                advice = "In the side panel Edit pairs, write what the edit does"
            problems.append(
                f"{said} {advice}, for all pairs or for each. Or write it for all pairs into the node Edit Pairs."
            )
            instruction = "-"  # so that the scan below finds the problems of the pictures
    scan = scan_folders(_config(data_set, instruction), observer, checked_dir=checked_dir)
    problems += scan.problems
    if problems:
        notes = () if is_swapped else scan.notes  # they would tell the same again; others wait until it is mended
        raise DatasetError(f"The data set {name} has {to_fix(len(problems))}", problems, (*data_set.notes, *notes))
    marked &= {pair.key for pair in scan.dataset.pairs}
    return dataclasses.replace(
        scan.dataset, held_out=tuple(sorted(marked)), notes=(*data_set.notes, *scan.dataset.notes)
    )


def _why_no_pair(target: Folder, reference: Folder) -> str:
    """Why two sides have no pair and what to do, as the end of a sentence that begins with the data set's name."""
    before, after = (counted(len(side.pictures), "picture") for side in (reference, target))
    for side in (reference, target):
        if not side.pictures and side.unread:
            return (
                f"has no pair: the pictures in {shown(side.root.name)} have formats that are not supported "
                f"({unread_names(side)}). Convert them to PNG or JPEG."
            )
    drop = "In the side panel Edit pairs, choose the data set and drop your pictures into"
    if not target.pictures and not reference.pictures:
        return f"has no pictures yet. {drop} Before and After."
    if not target.pictures:
        return f"has {before} before the edit, but none after it. {drop} After."
    if not reference.pictures:
        return f"has {after} after the edit, but none before it. {drop} Before."
    return (
        f"has no pair: {before} before the edit and {after} after it, but no two with the same name. Open the side "
        "panel Edit pairs and match them there."
    )


def _config(data_set: DataSet, instruction: str) -> DatasetConfig:
    return DatasetConfig(
        target_dir=str(data_set.folder("target")),
        reference_dirs=tuple(str(folder) for folder in data_set.references),
        caption_strategy="textfile" if is_blank(instruction) else "instanceprompt",
        instance_prompt="" if is_blank(instruction) else instruction,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Checks:
    """Sentences by the key of the pair that they are about, and those about the whole data set."""

    findings: dict[str, list[str]]
    notes: list[str]


def check_data_set(data_set: DataSet, observer: Observer = SILENT, *, checked_dir: Path | None = None) -> Checks:
    """Check all pictures and pairs: damaged files, missing captions, shifts, duplicates and the like.

    Raises:
        DatasetError: a picture changed while it was checked.
        DiskError: a name is too long, or the disk fails.
        Interrupted: the observer asked to stop.
    """
    target = scan_folder(data_set.folder("target"))
    reference = scan_folder(data_set.folder("reference"))
    findings: defaultdict[str, list[str]] = defaultdict(list)
    notes = list(data_set.notes)
    if not target.pictures.keys() & reference.pictures.keys():
        return Checks({}, [*notes, "There are no pairs to check."])
    scan = scan_folders(_config(data_set, "-"), observer, checked_dir=checked_dir)
    keys = {f"{shown(folder.pictures[key])}: ": key for folder in (target, reference) for key in folder.pictures}
    for problem in scan.problems:
        begin = next((each for each in keys if problem.startswith(each)), "")
        if begin:
            findings[keys[begin]].append(problem.removeprefix(begin))
        else:
            notes.append(problem)
    captioned = dataclasses.replace(
        scan.dataset, pairs=tuple(_with_captions(pair, target) for pair in scan.dataset.pairs)
    )
    if captioned.pairs:
        check = check_pairs(captioned, PairCheckConfig(), observer, checked_dir=checked_dir)
        for finding in check.findings:
            findings[finding.key].append(finding.text)
        notes += check.notes
    return Checks(dict(findings), [*notes, *scan.notes][:_MOST_NOTES])


def _with_captions(pair: EditPair, target: Folder) -> EditPair:
    """The pair with the captions in its text file; with none if there is no such file, or it can't be read."""
    try:
        captions = read_caption_file(target.texts[pair.key]) if pair.key in target.texts else ()
    except DatasetError:
        captions = ()
    return dataclasses.replace(pair, captions=captions)
