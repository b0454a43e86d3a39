"""Match folders of targets and references into pairs, or report every problem that prevents it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..config import ConditioningType, DatasetConfig, digest, to_json
from ..disk import disk_errors
from ..errors import DatasetError
from ..events import SILENT, Observer, watched
from ..geometry import Size, same_shape
from ..text import counted, printable, shown, some_of
from .caption_table import read_caption_table, table_path
from .captions import captions_of
from .checking import Checked, CheckedPictures, check_pictures
from .folders import FileState, Folder, file_states, scan_folder, take_out_masks
from .images import accepts_cut_pictures
from .kept import kept_file
from .layouts import Layout, recognise, rows_by_target, rows_of_other_folders
from .masks import PairMask, mask_problem
from .picture_notes import picture_notes, profile_note

LONGEST_SHAPE = 32  # the longer side over the shorter one, which then has 22 latents at a megapixel, 11 at 512²


@dataclass(frozen=True, slots=True)
class EditPair:
    """One target with its references and captions.

    `digests` (the `content_name` of each picture) and `sizes` (upright) list the target first, then the references.
    """

    key: str  # path below the folder without extension, Unicode NFC
    target: Path
    references: tuple[Path, ...]
    captions: tuple[str, ...]
    digests: tuple[str, ...] = ()
    sizes: tuple[Size, ...] = ()
    mask: PairMask | None = None
    conditioning_types: tuple[ConditioningType, ...] = ()  # one per reference; empty if all are auto


@dataclass(frozen=True, slots=True, repr=False)
class EditDataset:
    """Pairs sorted by key. Equal fingerprints mean equal keys, pictures, captions, masks and conditioning types."""

    pairs: tuple[EditPair, ...]
    fingerprint: str
    target_dir: Path
    reference_dirs: tuple[Path, ...]
    notes: tuple[str, ...] = ()

    def __repr__(self) -> str:
        folders = counted(len(self.reference_dirs), "reference folder")
        return f"EditDataset({len(self.pairs)} pairs, {folders}, {self.fingerprint})"


def reference_kinds(pair: EditPair) -> tuple[ConditioningType, ...]:
    """The conditioning type of each reference of a pair."""
    return pair.conditioning_types or ("auto",) * len(pair.references)


class FolderScan(NamedTuple):
    """The result of a scan. `dataset` holds only the pairs without problems."""

    dataset: EditDataset
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def pair_folders(config: DatasetConfig, observer: Observer = SILENT, *, checked_dir: Path | None = None) -> EditDataset:
    """Match targets, references and captions, and decode every picture once to check it.

    With `checked_dir`, the results are saved there in one file per set of folders, so that the next call decodes only
    pictures whose files have changed.

    Raises:
        DatasetError: the folders have problems; lists all of them, one per line.
        DiskError: a name is too long, or the disk fails.
        Interrupted: the observer asked to stop.
    """
    with disk_errors(Path(config.target_dir)):
        scan = scan_folders(config, observer, checked_dir=checked_dir)
    if scan.problems:
        raise DatasetError(
            f"The dataset can't be used: {counted(len(scan.problems), 'problem')}, "
            f"{counted(len(scan.dataset.pairs), 'good pair')}. Nothing was changed. Fix the problems below and run "
            "again:",
            scan.problems,
        )
    return scan.dataset


def scan_folders(config: DatasetConfig, observer: Observer = SILENT, *, checked_dir: Path | None = None) -> FolderScan:
    """The same as `pair_folders`, but returns the problems instead of raising them.

    Raises:
        Interrupted: the observer asked to stop.
    """
    roots = [Path(config.target_dir), *map(Path, config.reference_dirs)]
    problems = _clashes([*roots, *_mask_roots(config)], with_masks=bool(config.mask_dir))
    if problems:
        return FolderScan(_dataset([], roots, ()), tuple(problems), ())
    table_file = table_path(config)
    target, *others = folders = [
        scan_folder(root, table=table_file, observer=observer) for root in [*roots, *_mask_roots(config)]
    ]
    problems = [problem for folder in folders for problem in folder.problems] + take_out_masks(target, others)
    layout = recognise(target, others[: len(config.reference_dirs)], config)
    table, table_problems = _caption_table(config)
    table, table_notes = (None, []) if table is None else rows_by_target(table, target, config)
    rows_of_other_folders(table or (), target, config, layout)
    problems += layout.problems + table_problems
    notes = [note for folder in folders for note in folder.notes] + _leftovers(target, others) + table_notes
    if not target.pictures and not target.problems:
        problems.append(
            f"{shown(target.root)}: this target folder has no pictures. Put the edited pictures there or "
            "correct target_dir."
        )
    used = [folder.pictures[key] for key in target.pictures for folder in folders if key in folder.pictures]
    masks = set(others[-1].pictures.values()) if config.mask_dir else set()
    memory = checked_dir and kept_file(checked_dir, (folder.root for folder in folders))
    checked = check_pictures(used, observer, masks=masks, memory=memory)
    if accepts_cut_pictures():
        notes.append(
            "Another extension set PIL.ImageFile.LOAD_TRUNCATED_IMAGES, so truncated pictures are read with grey areas "
            "and not reported. Disable that extension to find them."
        )
    notes += _without_reference(folders, config)
    notes += _unused_rows(table, target, config)
    pairs = []
    for key in watched(sorted(target.pictures), observer):
        listed = None if table is None or key in layout.no_caption else table.get(key, ())
        pair, found = _pair(key, folders, checked, config, listed, layout)
        problems += found
        if pair is not None:
            pairs.append(pair)
    readable = {path: result for path, result in checked.items() if isinstance(result, Checked)}
    notes += picture_notes(readable, config.color_profiles)
    notes += profile_note({pair.key: [readable[path] for path in (pair.target, *pair.references)] for pair in pairs})
    return FolderScan(_dataset(pairs, roots, tuple(notes)), tuple(problems), tuple(notes))


def folder_state(config: DatasetConfig) -> str:
    """A digest that changes when a picture or text in the folders is added, removed, renamed or written.

    Opens no file.

    Raises:
        DiskError: a name is too long, or the disk fails.
    """
    with disk_errors(Path(config.target_dir)):
        return _folder_state(config)


def _folder_state(config: DatasetConfig) -> str:
    roots = [config.target_dir, *config.reference_dirs, *map(str, _mask_roots(config))]
    table = table_path(config)
    rows = (table.stat().st_size, table.stat().st_mtime_ns) if table is not None and table.is_file() else ()
    return digest([to_json(config), rows, [sorted(map(_printable, file_states(Path(root)))) for root in roots]])


def dataset_states(dataset: EditDataset) -> dict[str, FileState]:
    """Size and modification time of every picture and text in the dataset's folders and mask folders, by path."""
    masks = {pair.mask.path.parent for pair in dataset.pairs if pair.mask is not None}
    roots = {*masks, dataset.target_dir, *dataset.reference_dirs}
    return {str(root / name): (size, time) for root in roots for name, size, time in file_states(root)}


def _printable(state: tuple[str, int, int]) -> tuple[str, int, int]:
    return (printable(state[0]), *state[1:])


def _caption_table(config: DatasetConfig) -> tuple[dict[str, tuple[str, ...]] | None, list[str]]:
    """The caption table and no problems, or None and the problem. Empty if the strategy uses no table."""
    try:
        return read_caption_table(config), []
    except DatasetError as error:
        return None, [str(error)]


def _unused_rows(table: dict[str, tuple[str, ...]] | None, target: Folder, config: DatasetConfig) -> list[str]:
    unused = [key for key in table or () if key not in target.pictures]
    if not unused:
        return []
    return [
        f"Rows of {shown(config.captions.caption_file)} without a target, not used: {len(unused)} ({some_of(unused)})."
    ]


def _mask_roots(config: DatasetConfig) -> list[Path]:
    return [Path(config.mask_dir)] if config.mask_dir else []


def _clashes(roots: list[Path], *, with_masks: bool) -> list[str]:
    """Folders that are equal or nested. One picture would then be, for example, both target and reference."""
    names = ["target_dir", *(f"reference_dirs[{index}]" for index in range(len(roots) - 1))]
    if with_masks:
        names[-1] = "mask_dir"
    resolved = [root.resolve() for root in roots]
    problems = []
    for later in range(1, len(roots)):
        for earlier in range(later):
            pair = f"{names[earlier]} ({shown(roots[earlier])}) and {names[later]} ({shown(roots[later])})"
            if resolved[earlier] == resolved[later]:
                problems.append(f"{pair} are the same folder. Use a different folder for each.")
            elif resolved[earlier].is_relative_to(resolved[later]) or resolved[later].is_relative_to(resolved[earlier]):
                problems.append(f"{pair} are nested. Move one out of the other.")
    return problems


def _leftovers(target: Folder, others: list[Folder]) -> list[str]:
    """Notes on references, masks and texts that belong to no target and are not used."""
    files = chain(*(folder.pictures.items() for folder in others), target.texts.items())
    unused = [path for key, path in files if key not in target.pictures]
    notes = [f"{shown(path)}: not used, because no target has this name." for path in unused]
    for folder in others:
        if texts := [path.relative_to(folder.root).as_posix() for path in folder.texts.values()]:
            notes.append(
                f"{shown(folder.root)}: {counted(len(texts), '.txt file')} not used "
                f"({some_of(texts)}), because captions are read beside the targets, in {shown(target.root)}."
            )
    return notes


def _pair(
    key: str,
    folders: list[Folder],
    checked: CheckedPictures,
    config: DatasetConfig,
    listed: tuple[str, ...] | None,
    layout: Layout,
) -> tuple[EditPair | None, list[str]]:
    """The pair with this key, or its problems.

    `listed` holds the captions of the table. None: it has none, and another problem says why.
    """
    target, *others = folders
    path = target.pictures[key]
    problems = [
        f"{shown(path)}: no {_part(folder, config)} in {shown(folder.root)}; looked for {shown(key)} with a "
        f"picture extension{folder.almost(key)}."
        for folder in others
        if key not in folder.pictures and folder.root.is_dir() and not _may_lack(folder, config)
        if (folder.root, key) not in layout.no_reference
    ]
    paths = [folder.pictures[key] for folder in folders if key in folder.pictures]
    problems += [str(result) for result in (checked[path] for path in paths) if isinstance(result, DatasetError)]
    captions: tuple[str, ...] = ()
    try:
        captions = () if listed is None else captions_of(path, target.texts.get(key), config, listed)
    except DatasetError as error:
        problems.append(str(error))
    results = [result for result in (checked[path] for path in paths) if isinstance(result, Checked)]
    lacking = any(key not in folder.pictures and not _may_lack(folder, config) for folder in folders)
    if lacking or len(results) < len(paths):
        return None, problems
    mask = None
    if config.mask_dir:
        found = results.pop()
        mask = PairMask(paths.pop(), found.content(config.color_profiles), found.size)
        problems += filter(None, [mask_problem(mask, results[0].size, found.brightest)])
    digests = tuple(each.content(config.color_profiles) for each in results)
    sizes = tuple(each.size for each in results)
    kinds = reference_types(config, [key in folder.pictures for folder in others[: len(config.reference_dirs)]])
    problems += shape_problems(paths, sizes, kinds)
    if problems or not captions:
        return None, problems
    return EditPair(key, path, tuple(paths[1:]), captions, digests, sizes, mask, kinds), []


def _part(folder: Folder, config: DatasetConfig) -> str:
    return "mask" if config.mask_dir and folder.root == Path(config.mask_dir) else "reference"


def _may_lack(folder: Folder, config: DatasetConfig) -> bool:
    return config.references_optional and _part(folder, config) == "reference"


def _without_reference(folders: list[Folder], config: DatasetConfig) -> list[str]:
    """How many references each optional folder lacks, so that a misspelt name or extension does not go unnoticed."""
    target, *others = folders
    notes = []
    for folder in others:
        keys = [key for key in sorted(target.pictures) if key not in folder.pictures]
        if keys and _may_lack(folder, config):
            notes.append(f"Targets without a reference in {shown(folder.root)}: {len(keys)} ({some_of(keys)}).")
    return notes


def _dataset(pairs: list[EditPair], roots: list[Path], notes: tuple[str, ...]) -> EditDataset:
    masks = {pair.key: pair.mask.digest for pair in pairs if pair.mask is not None}
    kinds = {pair.key: pair.conditioning_types for pair in pairs if pair.conditioning_types}
    content: list[object] = [[pair.key, pair.digests, pair.captions] for pair in pairs]
    fingerprint = digest([*content, *filter(None, (masks, kinds))])
    return EditDataset(tuple(pairs), fingerprint, roots[0], tuple(roots[1:]), notes)


def reference_types(config: DatasetConfig, present: Sequence[bool]) -> tuple[ConditioningType, ...]:
    """Conditioning types of a pair's references; empty if all are auto.

    `present` says for each reference folder whether the pair has a picture in it.
    """
    kinds = config.conditioning_type
    if set(kinds) == {"auto"}:
        return ()
    if len(kinds) == 1:
        kinds *= len(config.reference_dirs)
    return tuple(kind for kind, has in zip(kinds, present, strict=True) if has)


def shape_problems(paths: Sequence[Path], sizes: Sequence[Size], kinds: Sequence[ConditioningType]) -> list[str]:
    """Pictures that are too narrow, and reference_strict references whose aspect ratio differs from the target's.

    `paths` and `sizes` list the target first, then the references.
    """
    narrow = [
        f"{shown(path)}: the picture is {size.width} x {size.height}. A side may be at most {LONGEST_SHAPE} times the "
        "other. Crop it or remove the pair."
        for path, size in zip(paths, sizes, strict=True)
        if max(size) > LONGEST_SHAPE * min(size)
    ]
    return narrow + [
        f"{shown(path)}: the reference is {size.width} x {size.height} and its target {sizes[0].width} x "
        f"{sizes[0].height}, so reference_strict can't crop both alike. Give it the target's aspect ratio (the size "
        "may differ) or set conditioning_type to reference_loose."
        for path, size, kind in zip(paths[1:], sizes[1:], kinds, strict=False)
        if kind == "reference_strict" and not same_shape(sizes[0], size)
    ]
