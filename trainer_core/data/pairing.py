"""Match folders of targets and references into pairs, or report every problem that prevents it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from ..config import ConditioningType, DatasetConfig, digest, to_json
from ..disk import disk_errors
from ..errors import DatasetError
from ..events import SILENT, Observer, watched
from ..geometry import Size, same_shape
from ..text import counted, printable, shown, some_of, to_fix
from .caption_table import CaptionTable, read_caption_table, table_path
from .captions import captions_of
from .checking import Checked, CheckedPictures, check_pictures
from .folders import FileState, Folder, file_states, scan_folder, take_out_masks, unread_names
from .images import accepts_cut_pictures
from .kept import kept_file
from .layouts import SWAPPED, Layout, recognise, rows_by_target
from .masks import PairMask, mask_problem
from .picture_notes import picture_notes, profile_note
from .sides import swapped_note

_TARGET, _MASK = "target folder", "mask folder"
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
    """Pairs sorted by key. Equal fingerprints mean equal keys, pictures, captions, masks and conditioning types.

    `held_out` has the keys of the pairs to validate and not to train on; empty: `num_eval_images` chooses.
    """

    pairs: tuple[EditPair, ...]
    fingerprint: str
    target_dir: Path
    reference_dirs: tuple[Path, ...]
    notes: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        folders = counted(len(self.reference_dirs), "reference folder")
        return f"EditDataset({len(self.pairs)} pairs, {folders}, {self.fingerprint})"

    def references_by_folder(self, pair: EditPair) -> tuple[int | None, ...]:
        """For each reference folder the number of its picture in `pair.references`; None if the pair lacks it."""
        return tuple(
            next((number for number, path in enumerate(pair.references) if path.is_relative_to(folder)), None)
            for folder in self.reference_dirs
        )


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
        DatasetError: the folders have problems; lists all of them, and the notes, such as which files are not used.
        DiskError: a name is too long, or the disk fails.
        Interrupted: the observer asked to stop.
    """
    with disk_errors(Path(config.target_dir)):
        scan = scan_folders(config, observer, checked_dir=checked_dir)
    if scan.problems:
        raise DatasetError(f"The dataset has {to_fix(len(scan.problems))}", scan.problems, scan.notes)
    return scan.dataset


def scan_folders(config: DatasetConfig, observer: Observer = SILENT, *, checked_dir: Path | None = None) -> FolderScan:
    """The same as `pair_folders`, but returns the problems instead of raising them.

    Raises:
        Interrupted: the observer asked to stop.
    """
    if clashes := _clashes(config, observer):
        return FolderScan(_dataset([], config, ()), tuple(clashes), ())
    folders = _Folders.scanned(config, observer)
    target = folders.target
    problems = [problem for folder in folders.every for problem in folder.problems]
    problems += take_out_masks(target, folders.others)
    layout = recognise(target, folders.references, config, folders.masks)
    table = _caption_table(target, config, layout)
    problems += layout.problems
    if not target.pictures and not target.problems:
        lack = "has no pictures. Put the edited pictures there, or choose another folder for the targets."
        if target.unread:
            lack = f"only has formats that are not supported ({unread_names(target)}). Convert them to PNG or JPEG."
        problems.append(f"{shown(target.root)}: this target folder {lack}")
    checked = folders.checked_pictures(observer, checked_dir)
    pairs: list[EditPair] = []
    for key in watched(sorted(target.pictures), observer):
        captions, uncaptioned = _captions(key, target, table, config, layout)
        pair, found = _pair(key, captions, folders, checked, config, layout)
        problems += found + uncaptioned
        pairs += [] if pair is None else [pair]
    is_told = any(SWAPPED in problem for problem in problems)
    swapped = "" if is_told else swapped_note(target, folders.references, config)
    notes = (*folders.notes(config), *layout.notes, *_notes_on_pictures(checked, pairs, config))
    notes = (swapped, *notes) if swapped else notes
    return FolderScan(_dataset(pairs, config, notes), tuple(problems), notes)


@dataclass(frozen=True, slots=True)
class _Folders:
    """The files of a dataset's folders. `masks` is None if it has no masks."""

    target: Folder
    references: tuple[Folder, ...]
    masks: Folder | None

    @staticmethod
    def scanned(config: DatasetConfig, observer: Observer) -> _Folders:
        table = table_path(config)

        def scan(root: str) -> Folder:
            return scan_folder(Path(root), table=table, observer=observer)

        references = tuple(map(scan, config.reference_dirs))
        return _Folders(scan(config.target_dir), references, scan(config.mask_dir) if config.mask_dir else None)

    @property
    def others(self) -> tuple[Folder, ...]:
        """The folders of references and masks."""
        return self.references if self.masks is None else (*self.references, self.masks)

    @property
    def every(self) -> tuple[Folder, ...]:
        return self.target, *self.others

    def pictures_of(self, key: str) -> list[Path]:
        """Target, references and mask with this key, without those that it lacks."""
        return [folder.pictures[key] for folder in self.every if key in folder.pictures]

    def checked_pictures(self, observer: Observer, checked_dir: Path | None) -> CheckedPictures:
        """The results of decoding all pictures that a target uses."""
        used = [path for key in self.target.pictures for path in self.pictures_of(key)]
        masks = set() if self.masks is None else set(self.masks.pictures.values())
        memory = checked_dir and kept_file(checked_dir, (folder.root for folder in self.every))
        return check_pictures(used, observer, masks=masks, memory=memory)

    def notes(self, config: DatasetConfig) -> Iterator[str]:
        """Which files are not used, and which targets lack an optional reference."""
        for folder in self.every:
            yield from folder.notes
        if not self.target.pictures:  # the problem says so; nothing of the other folders can be used
            return
        for folder in self.others:
            unused = [path for key, path in folder.pictures.items() if key not in self.target.pictures]
            yield from _unused(folder, unused, "picture", "no target has this name")
            beside = f"captions are read beside the targets, in {shown(self.target.root)}"
            yield from _unused(folder, list(folder.texts.values()), "text", beside)
        unnamed = [path for key, path in self.target.texts.items() if key not in self.target.pictures]
        yield from _unused(self.target, unnamed, "text", "no target has this name")
        for folder in self.references if config.references_optional else ():
            keys = [key for key in sorted(self.target.pictures) if key not in folder.pictures]
            if keys:
                yield f"Targets without a reference in {shown(folder.root)}: {len(keys)} ({some_of(keys)})."


def _unused(folder: Folder, files: Sequence[Path], kind: str, why: str) -> Iterator[str]:
    if files:
        names = some_of([path.relative_to(folder.root).as_posix() for path in files])
        yield f"{shown(folder.root)}: {counted(len(files), kind)} not used ({names}), because {why}."


def _notes_on_pictures(checked: CheckedPictures, pairs: Sequence[EditPair], config: DatasetConfig) -> Iterator[str]:
    if accepts_cut_pictures():
        yield (
            "Another extension set PIL.ImageFile.LOAD_TRUNCATED_IMAGES, so truncated pictures are read with grey areas "
            "and not reported. Disable that extension to find them."
        )
    readable = {path: result for path, result in checked.items() if isinstance(result, Checked)}
    yield from picture_notes(readable, config.color_profiles)
    yield from profile_note({pair.key: [readable[path] for path in (pair.target, *pair.references)] for pair in pairs})


def folder_state(config: DatasetConfig) -> str:
    """A digest that changes when a picture or text in the folders is added, removed, renamed or written.

    Opens no file.

    Raises:
        DiskError: a name is too long, or the disk fails.
    """
    with disk_errors(Path(config.target_dir)):
        return _folder_state(config)


def _folder_state(config: DatasetConfig) -> str:
    roots = _named_roots(config).values()
    table = table_path(config)
    rows = (table.stat().st_size, table.stat().st_mtime_ns) if table is not None and table.is_file() else ()
    return digest([to_json(config), rows, [sorted(map(_printable, file_states(root))) for root in roots]])


def dataset_states(dataset: EditDataset) -> dict[str, FileState]:
    """Size and modification time of every picture and text in the dataset's folders and mask folders, by path."""
    masks = {pair.mask.path.parent for pair in dataset.pairs if pair.mask is not None}
    roots = {*masks, dataset.target_dir, *dataset.reference_dirs}
    return {str(root / name): (size, time) for root in roots for name, size, time in file_states(root)}


def _printable(state: tuple[str, int, int]) -> tuple[str, int, int]:
    return (printable(state[0]), *state[1:])


def _caption_table(target: Folder, config: DatasetConfig, layout: Layout) -> CaptionTable:
    """The caption table; empty if the strategy uses none. If it can't be read, no target needs a problem of its own."""
    try:
        return rows_by_target(read_caption_table(config), target, config, layout)
    except DatasetError as error:
        layout.problems.append(str(error))
        layout.no_caption.update(target.pictures)
        return {}


def _named_roots(config: DatasetConfig) -> dict[str, Path]:
    """The folders by the label of their widget."""
    references = {f"reference folder {number}": root for number, root in enumerate(config.reference_dirs, 1)}
    roots = {_TARGET: config.target_dir, **references, _MASK: config.mask_dir}
    return {name: Path(root) for name, root in roots.items() if root}


def _clashes(config: DatasetConfig, observer: Observer) -> list[str]:
    """Folders that are equal or nested. One picture would then be, for example, both target and reference."""
    problems: list[str] = []
    one_folder = False  # for targets and references
    for (name, root), (other_name, other) in combinations(_named_roots(config).items(), 2):
        both = f"{name} ({shown(root)}) and {other_name} ({shown(other)})"
        one, two = root.resolve(), other.resolve()
        if one == two and name == _TARGET and other_name != _MASK:
            one_folder = True
            problems.append(
                f"{both} are the same folder. Put the targets into one folder and the references into another, with "
                "the same names."
            )
        elif one == two:
            problems.append(f"{both} are the same folder. Use a different folder for each.")
        elif one.is_relative_to(two) or two.is_relative_to(one):
            problems.append(f"{both} are nested. Move one out of the other.")
    if one_folder:
        target = scan_folder(Path(config.target_dir), observer=observer)
        problems += target.problems + recognise(target, (), config).problems
    return problems


def _captions(
    key: str, target: Folder, table: CaptionTable, config: DatasetConfig, layout: Layout
) -> tuple[tuple[str, ...], list[str]]:
    """The captions of a target and no problem, or no captions and what is wrong, unless `layout` says so already."""
    if key in layout.no_caption:
        return (), []
    try:
        return captions_of(target.pictures[key], target.texts.get(key), config, table.get(key, ())), []
    except DatasetError as error:
        return (), [str(error)]


def _pair(
    key: str,
    captions: tuple[str, ...],
    folders: _Folders,
    checked: CheckedPictures,
    config: DatasetConfig,
    layout: Layout,
) -> tuple[EditPair | None, list[str]]:
    """The pair with this key and no problems, or None and the problems of its pictures. None also without captions."""
    needed = folders.others if not config.references_optional else filter(None, [folders.masks])
    lacking = [folder for folder in needed if key not in folder.pictures]
    paths = folders.pictures_of(key)
    put = f". Put a picture named {shown(key)} (.png, .jpg or the like) there, or remove the target"
    problems = [
        f"{shown(paths[0])}: there is no "
        f"{'mask' if folder is folders.masks else 'reference (picture before the edit)'} for it in "
        f"{shown(folder.root)}{folder.almost(key) or put}."
        for folder in lacking
        if (folder.root, key) not in layout.no_reference and folder.root.is_dir()
    ]
    problems += [str(result) for path in paths if isinstance(result := checked[path], DatasetError)]
    results = [result for path in paths if isinstance(result := checked[path], Checked)]
    if lacking or len(results) < len(paths):
        return None, problems
    mask = None
    if folders.masks is not None:
        found = results.pop()
        mask = PairMask(paths.pop(), found.content(config.color_profiles), found.size)
        problems += filter(None, [mask_problem(mask, results[0].size, found.spread)])
    digests = tuple(each.content(config.color_profiles) for each in results)
    sizes = tuple(each.size for each in results)
    kinds = reference_types(config, [key in folder.pictures for folder in folders.references])
    problems += shape_problems(paths, sizes, kinds)
    if problems or not captions:
        return None, problems
    return EditPair(key, paths[0], tuple(paths[1:]), captions, digests, sizes, mask, kinds), []


def _dataset(pairs: list[EditPair], config: DatasetConfig, notes: tuple[str, ...]) -> EditDataset:
    masks = {pair.key: pair.mask.digest for pair in pairs if pair.mask is not None}
    kinds = {pair.key: pair.conditioning_types for pair in pairs if pair.conditioning_types}
    content: list[object] = [[pair.key, pair.digests, pair.captions] for pair in pairs]
    fingerprint = digest([*content, *filter(None, (masks, kinds))])
    references = tuple(map(Path, config.reference_dirs))
    return EditDataset(tuple(pairs), fingerprint, Path(config.target_dir), references, notes)


def reference_types(config: DatasetConfig, present: Sequence[bool]) -> tuple[ConditioningType, ...]:
    """Conditioning types of a pair's references; empty if all are auto.

    `present` says for each reference folder whether the pair has a picture in it.
    """
    kinds = config.conditioning_type
    if set(kinds) <= {"auto"}:
        return ()
    if len(kinds) == 1:
        kinds *= len(config.reference_dirs)
    return tuple(kind for kind, has in zip(kinds, present, strict=True) if has)


def too_narrow(size: Size) -> str:
    """What is wrong with the shape of a picture of this size, as sentences after "the picture"; empty if nothing."""
    if max(size) <= LONGEST_SHAPE * min(size):
        return ""
    return f"is {size.width} x {size.height}. The long side may be at most {LONGEST_SHAPE} times the short one."


def shape_problems(paths: Sequence[Path], sizes: Sequence[Size], kinds: Sequence[ConditioningType]) -> list[str]:
    """Pictures that are too narrow, and reference_strict references whose aspect ratio differs from the target's.

    `paths` and `sizes` list the target first, then the references.
    """
    narrow = [
        f"{shown(path)}: the picture {problem} Crop it or remove the pair."
        for path, size in zip(paths, sizes, strict=True)
        if (problem := too_narrow(size))
    ]
    return narrow + [
        f"{shown(path)}: the reference is {size.width} x {size.height} and its target {sizes[0].width} x "
        f"{sizes[0].height}, so reference_strict can't crop both alike. Give it the target's aspect ratio (the size "
        "may differ) or set conditioning_type to reference_loose."
        for path, size, kind in zip(paths[1:], sizes[1:], kinds, strict=False)
        if kind == "reference_strict" and not same_shape(sizes[0], size)
    ]
