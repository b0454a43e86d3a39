"""List the pictures and texts in a folder without opening them."""

from __future__ import annotations

import os
import stat
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..events import SILENT, Observer, watched
from ..settings import did_you_mean
from ..text import counted, reason_of, shown, some_of
from .images import PICTURE_SUFFIXES, UNREAD_PICTURE_SUFFIXES

CAPTION_SUFFIXES = frozenset({".txt", ".caption"})
_SYSTEM_NAMES = frozenset(  # in lower case: what operating systems and network drives put into folders
    {"@eadir", "@tmp", "@sharebin", "@recycle", "#recycle", "#snapshot", "@recently-snapshot", "__macosx", "lost+found"}
    | {"$recycle.bin", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
)
_MASK_ENDINGS = ("-masklabel", "_masklabel", "-mask", "_mask")  # the first is SimpleTuner's
_MASK_FOLDERS = ("mask", "masks", "masklabel", "masklabels")
FileState = tuple[int, int]  # size in bytes, modification time (ns)


@dataclass(slots=True)
class Folder:
    """The files below one folder, by key: the path below the folder without extension, in Unicode NFC."""

    root: Path
    pictures: dict[str, Path] = field(default_factory=dict)
    texts: dict[str, Path] = field(default_factory=dict)
    unread: dict[str, Path] = field(default_factory=dict)  # pictures in unsupported formats
    others: list[Path] = field(default_factory=list)  # files that are neither texts nor pictures that can be read
    system: list[str] = field(default_factory=list)  # names of hidden files and folders, and of those of the system
    caseless: dict[str, Path] = field(default_factory=dict)  # pictures by case-folded key
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def almost(self, key: str) -> str:
        """A hint, for the end of a message, about a file that almost matches a missing key; empty if there is none."""
        if key in self.unread:
            return f". Convert {shown(self.unread[key].name)} to PNG or JPEG, because its format is not supported"
        other = self.caseless.get(key.casefold())
        if other is not None:
            return f". Rename {shown(other.relative_to(self.root))} or the target, because only the letter case differs"
        return ""


def unread_names(folder: Folder) -> str:
    """The first pictures of a folder whose formats are not supported, for a message."""
    return some_of([path.relative_to(folder.root).as_posix() for path in folder.unread.values()])


def scan_folder(root: Path, *, table: Path | None = None, observer: Observer = SILENT) -> Folder:
    """List a folder and its subfolders in name order.

    `problems` and `notes` give the reason for every file that is left out. `table` is the caption table, which may be
    in the folder.

    Raises:
        Interrupted: the observer asked to stop.
    """
    folder = Folder(root)
    if not root.is_dir():
        problem = "this is a file, not a folder." if root.exists() else f"the folder does not exist.{_nearest(root)}"
        folder.problems.append(f"{shown(root)}: {problem}")
        return folder
    resolved = root.resolve()
    for path in watched(_files(folder, root), observer):
        kinds = _kind_of(folder, path)
        if (kinds is None or kinds is folder.unread) and path != table:
            folder.others.append(path)
        if kinds is None:
            continue
        reason = _unfit(path, resolved)
        if reason:
            folder.problems.append(f"{shown(path)}: {reason}")
        else:
            _add(folder, kinds, path)
    folder.texts = _texts_by_picture(folder)
    folder.notes += _passed_over(folder)
    return folder


def _texts_by_picture(folder: Folder) -> dict[str, Path]:
    """The texts by key. A text that is named like the whole picture file (000.png.txt) gets that picture's key."""
    whole = {f"{key}{path.suffix}": key for key, path in folder.pictures.items()}
    found: dict[str, Path] = {}
    for key, path in folder.texts.items():
        picture = whole.get(key, key)
        found[key if key in folder.pictures or picture in folder.texts else picture] = path
    return found


def _passed_over(folder: Folder) -> Iterator[str]:
    """Notes on the files that are not used, grouped by extension."""
    groups: dict[str, list[Path]] = defaultdict(list)
    for path in folder.others:
        groups[path.suffix.lower()].append(path)
    for suffix, paths in groups.items():
        names = some_of([path.relative_to(folder.root).as_posix() for path in paths])
        kind = counted(len(paths), f"{shown(suffix) if suffix else 'extensionless'} file")
        why = "this is not the extension of a picture"
        if suffix in UNREAD_PICTURE_SUFFIXES:
            why = "this format is not supported. Convert to PNG or JPEG to use them"
        if suffix in CAPTION_SUFFIXES:
            why = "a .txt file has the same name"
        yield f"{shown(folder.root)}: {kind} not used ({names}), because {why}."
    if folder.system:
        names = some_of(list(dict.fromkeys(folder.system)))
        yield f"{shown(folder.root)}: hidden and system files and folders not used: {len(folder.system)} ({names})."


def take_out_masks(target: Folder, others: Sequence[Folder]) -> list[str]:
    """Take pictures that look like masks out of the targets. Returns the problem in a list; empty if there are none.

    Such a picture is named like another target plus an ending, or lies in a folder of masks under that target's name,
    and has neither references nor a caption.
    """
    found: list[str] = []
    for key in sorted(target.pictures):
        bare = next((key[: -len(end)] for end in _MASK_ENDINGS if key.lower().endswith(end)), key)
        bare = "/".join(part for part in bare.split("/") if part.lower() not in _MASK_FOLDERS)
        used = key in target.texts or any(key in folder.pictures for folder in others)
        if bare != key and bare in target.pictures and not used:
            found.append(target.pictures.pop(key).relative_to(target.root).as_posix())
    if not found:
        return []
    return [
        f"{shown(target.root)}: pictures that look like masks of targets: {len(found)} ({some_of(found)}). Move them "
        "to a folder of their own, name them like their targets, and set mask_dir to it; or remove them."
    ]


def file_states(root: Path) -> Iterator[tuple[str, int, int]]:
    """Path below the folder, size in bytes and modification time (ns) of each picture and text, without opening it."""
    for path in _files(Folder(root), root):
        if path.suffix.lower() in PICTURE_SUFFIXES | UNREAD_PICTURE_SUFFIXES | CAPTION_SUFFIXES:
            try:
                state = path.stat()
            except OSError:
                yield path.relative_to(root).as_posix(), -1, -1
            else:
                yield path.relative_to(root).as_posix(), state.st_size, state.st_mtime_ns


def changed_files(before: Mapping[str, FileState], after: Mapping[str, FileState]) -> tuple[str, ...]:
    """Names of the files that were added, removed or changed, sorted."""
    names = sorted(before.keys() | after.keys())
    return tuple(name for name in names if before.get(name) != after.get(name))


def _files(folder: Folder, start: Path) -> Iterator[Path]:
    """All files below `start`, sorted. Reports folders that can't be listed in the problems of `folder`."""
    waiting = [start]
    while waiting:
        path = waiting.pop()
        try:
            with os.scandir(path) as listing:
                everything = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            folder.problems.append(
                f"{shown(path)}: the folder can't be read ({error.strerror}). Check its permissions."
            )
            continue
        entries = [entry for entry in everything if not is_system_name(entry.name)]
        folder.system += [entry.name for entry in everything if is_system_name(entry.name)]
        linked = [entry for entry in entries if entry.is_symlink() and _is_folder(entry)]
        folder.problems += [
            f"{shown(entry.path)}: links to folders aren't followed. Move the pictures here, or remove the link."
            for entry in linked
        ]
        waiting += [Path(entry.path) for entry in reversed(entries) if entry.is_dir(follow_symlinks=False)]
        yield from (Path(entry.path) for entry in entries if not _is_folder(entry))


def is_system_name(name: str) -> bool:
    """Whether a file or folder is hidden, or of an operating system or a network drive."""
    return name.startswith(".") or name.lower() in _SYSTEM_NAMES


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether this is a folder or a link to one. A link that points to itself is not."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _kind_of(folder: Folder, path: Path) -> dict[str, Path] | None:
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return folder.pictures
    if suffix in UNREAD_PICTURE_SUFFIXES:
        return folder.unread
    return folder.texts if suffix in CAPTION_SUFFIXES else None


def _nearest(missing: Path) -> str:
    """The end of a message: the folder beside it with the most similar name."""
    try:
        with os.scandir(missing.parent) as entries:
            beside = [entry.name for entry in entries if entry.is_dir()]
    except OSError:
        return ""
    return did_you_mean(missing.name, map(shown, beside))


def _unfit(path: Path, root: Path) -> str:
    """Why this file must not be opened; empty if it is safe to open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return "its name isn't valid Unicode. Rename it."
    try:
        if path.is_symlink() and not path.resolve(strict=True).is_relative_to(root):
            return "the link points outside the dataset's folder. Put the file itself here."
        if not stat.S_ISREG(path.stat().st_mode):
            return "this is not a regular file. Remove it."
    except (OSError, RuntimeError) as error:  # Python before 3.13 raises RuntimeError for a link cycle
        return f"the file can't be reached ({reason_of(error)}). Remove it or the link."
    return ""


def _add(folder: Folder, kinds: dict[str, Path], path: Path) -> None:
    key = unicodedata.normalize("NFC", path.relative_to(folder.root).with_suffix("").as_posix())
    if key not in kinds:
        kinds[key] = path
        if kinds is folder.pictures:
            folder.caseless.setdefault(key.casefold(), path)
    elif kinds is folder.texts and path.suffix.lower() != kinds[key].suffix.lower():
        txt, other = sorted((path, kinds[key]), key=lambda each: each.suffix.lower() != ".txt")
        kinds[key] = txt
        folder.others.append(other)
    elif kinds is not folder.unread:
        twin = kinds[key]
        same = "the same name except for the extension"
        if path.suffix == twin.suffix:
            same = "the same name in another spelling of its accented letters (Unicode NFC and NFD)"
        folder.problems.append(f"{shown(path)}: {shown(twin.name)} has {same}. Keep only one of the two.")
