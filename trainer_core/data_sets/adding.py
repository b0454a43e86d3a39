"""Adds pictures and captions from outside to a data set: decoded, checked, under cleaned names, replacing nothing."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import BinaryIO, NamedTuple

from ..data.captions import MAX_CAPTION_FILE_BYTES, decoded_text
from ..data.folders import Folder, scan_folder
from ..data.images import decode_picture, format_of, open_picture_file, picture_header, suffix_of
from ..data.pairing import shape_problems
from ..disk import disk_errors, size_in_words
from ..errors import DatasetError, DiskError
from ..files import remove, rename, temporary_beside
from ..text import LONGEST_PROMPT, counted, is_blank, reason_of, shown, text_problem
from .changes import free_stem, numbered, write_caption
from .folders import TRASH, DataSet, Usage, usage
from .moves import check_folders
from .names import AUTO, SIDES, Place, clean_stem, places_of, same_stem
from .trash import read_trash

_CHUNK = 1 << 20
_MOST_PROBLEMS = 100
_DIRECTORY_BYTES = 4_000_000  # of a ZIP file's list of contents, about 40,000 names
_PACKED = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_MOST_RATIO, _RATIO_ABOVE = 300, 4_000_000  # a file of more bytes may unpack to so many times its packed size
_ENCRYPTED = 1


class Limits(NamedTuple):
    """The most that is added: bytes of a file, pixels of a picture, and files and bytes of a whole data set."""

    file_bytes: int = 100_000_000
    zip_bytes: int = 4_000_000_000
    pixels: int = 64_000_000
    files: int = 20_000
    set_bytes: int = 20_000_000_000


LIMITS = Limits()


@dataclass(slots=True)
class Added:
    """What was added (file, side), and a sentence for each file that was not."""

    added: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def refuse(self, problem: str) -> None:
        """Adds a sentence. After many of them, only says that there are more."""
        if len(self.problems) <= _MOST_PROBLEMS:
            more = "More files were not added, for reasons like these."
            self.problems.append(problem if len(self.problems) < _MOST_PROBLEMS else more)


def full(data_set: DataSet, limits: Limits = LIMITS) -> str:
    """The end of a sentence on a data set that takes no more files, and how to make room."""
    text = f"the data set is full. It may have {limits.files:,} files and {size_in_words(limits.set_bytes)}."
    trash = read_trash(data_set)
    if trash.files:
        text += (
            f" Its trash has {counted(trash.files, 'file')} ({size_in_words(trash.bytes)}). Empty it in the side panel "
            "Edit pairs if you don't need them."
        )
    below = usage(data_set.root / TRASH)
    if others := below.files - trash.files:
        size = size_in_words(below.bytes - trash.bytes)
        text += f" Its folder {TRASH} has {counted(others, 'other file')} ({size}). Delete them there."
    return text


def is_zip(name: str) -> bool:
    """Whether a file is added as a ZIP file, by its name."""
    return name.lower().endswith(".zip")


@contextmanager
def received_file(data_set: DataSet) -> Iterator[Path]:
    """A hidden path in the data set's folder, to write a received file to. It is removed in the end."""
    temporary = temporary_beside(data_set.root / "received")
    try:
        yield temporary
    finally:
        remove(temporary)


def add_file(data_set: DataSet, received: Path, name: str, side: str = AUTO, limits: Limits = LIMITS) -> Added:
    """Add a received file: a picture, a caption, or a ZIP file of both. `name` is what its sender calls it.

    `received` lies in the data set's folder and may be gone afterwards. Must be called inside `moves.changing`. What
    can't be used is in the problems of the result.

    Raises:
        DatasetError: the side doesn't exist, or a folder of the data set is a link.
        DiskError: the disk is full or fails.
    """
    if side not in (AUTO, *SIDES):
        raise DatasetError(f"There is no side {shown(side)}. Use one of: {', '.join((AUTO, *SIDES))}.")
    result = Added()
    with disk_errors(data_set.root):
        adding = _Adding(data_set, limits, result)
        if is_zip(name):
            adding.add_zip(received, side)
        else:
            (place,) = places_of([name], side)
            adding.add(received, name, place)
    return result


class _Adding:
    """Adds files to one data set, whose folders are listed once."""

    def __init__(self, data_set: DataSet, limits: Limits, result: Added) -> None:
        self._data_set, self._limits, self._result = data_set, limits, result
        self._folders: dict[str, Folder] = {}
        self._used = usage(data_set.root)

    def add(self, received: Path, name: str, place: Place | str) -> None:
        """Add one file, or say why not."""
        shown_name = shown(name.replace("\\", "/").rpartition("/")[2])
        if isinstance(place, str):
            if place:
                self._result.refuse(place)
            return
        try:
            add = self._add_text if place.is_text else self._add_picture
            file = add(received, Path(clean_stem(place.stem) + place.suffix), place.side)
        except DiskError:
            raise
        except DatasetError as error:
            self._result.refuse(str(error).replace(str(received), shown_name))
            return
        self._result.added.append((file, place.side))

    def _add_picture(self, received: Path, name: Path, side: str) -> str:
        self._check_room(received)
        header = picture_header(received, name.name)
        if header.size.width * header.size.height > self._limits.pixels:
            raise DatasetError(
                f"{shown(name)}: the picture has {header.size.width} x {header.size.height} pixels; at most "
                f"{self._limits.pixels // 10**6} million are added. Make it smaller; a few megapixels are enough."
            )
        if problems := shape_problems([name], [header.size], []):
            raise DatasetError(problems[0])
        with open_picture_file(received) as file:
            decode_picture(file, name, convert=False)
        suffix = name.suffix if format_of(name.name) == header.format else suffix_of(header.format)
        folder = self._folder(side)
        stem = self._partner_stem(name.stem, side)
        taken = {same_stem(key): file for key, file in (folder.unread | folder.pictures).items()}
        for each in takewhile(lambda each: same_stem(each) in taken, numbered(stem)):
            if _same_bytes(taken[same_stem(each)], received):
                return taken[same_stem(each)].relative_to(folder.root).as_posix()
        stem = free_stem(stem, set(taken))
        path = folder.root / f"{stem}{suffix}"
        check_folders(self._data_set, path)
        path.parent.mkdir(exist_ok=True)
        if os.path.lexists(path):
            raise DatasetError(f"{shown(path.name)}: something else has this name. Rename the picture.")
        rename(received, path)
        folder.pictures[stem] = path
        return path.name

    def _add_text(self, received: Path, name: Path, _side: str) -> str:
        if received.stat().st_size > MAX_CAPTION_FILE_BYTES:
            raise DatasetError(f"{shown(name)}: the caption file is larger than 1 MB. Replace it with a short text.")
        text = decoded_text(received.read_bytes(), name).strip()
        if problem := text_problem(text, LONGEST_PROMPT):
            raise DatasetError(f"{shown(name)}: the caption {problem}.")
        if is_blank(text):
            raise DatasetError(f"{shown(name)}: the caption file is empty.")
        self._check_room(received)
        folder = self._folder("target")
        key = self._partner_stem(name.stem, "target", own=True)
        present = folder.texts.get(key)
        if present is not None:
            if decoded_text(present.read_bytes()[:MAX_CAPTION_FILE_BYTES], present).strip() != text:
                raise DatasetError(f"{shown(name)}: the pair has another caption already, which is kept.")
            return present.relative_to(folder.root).as_posix()
        path = folder.root / f"{key}.txt"
        write_caption(self._data_set, path, text)
        folder.texts[key] = path
        return path.relative_to(folder.root).as_posix()

    def _check_room(self, received: Path) -> None:
        size = received.stat().st_size
        if size > self._limits.file_bytes:
            raise DatasetError(_too_large(received, self._limits.file_bytes))
        used = self._used
        if used.files > self._limits.files or used.bytes > self._limits.set_bytes:
            raise DatasetError(f"{received}: it was not added, because {full(self._data_set, self._limits)}")

    def _folder(self, side: str) -> Folder:
        """The files of a side. Only those directly in its folder matter here."""
        if side not in self._folders:
            root = self._data_set.folder(side)
            self._folders[side] = scan_folder(root) if root.is_dir() else Folder(root)
        return self._folders[side]

    def _partner_stem(self, stem: str, side: str, *, own: bool = False) -> str:
        """The stem as a picture of another side spells it, if one differs only in letter case or Unicode form."""
        sides = [each for each in self._data_set.sides if own or each != side]
        keys = (key for each in sides for key in self._folder(each).pictures)
        return next((key for key in keys if same_stem(key) == same_stem(stem)), stem)

    def add_zip(self, received: Path, side: str) -> None:
        """Add the pictures and captions in a ZIP file. Unpacks one at a time, and nothing under its own name."""
        try:
            with received.open("rb") as file, zipfile.ZipFile(_Listed(file)) as archive:
                entries = [entry for entry in archive.infolist() if not entry.is_dir()]
                if len(entries) > self._limits.files:
                    raise DatasetError(
                        f"The ZIP file has {counted(len(entries), 'file')}; at most {self._limits.files:,} are added."
                    )
                places = places_of([entry.filename for entry in entries], side)
                self._unpack(archive, list(zip(entries, places, strict=True)))
        except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
            if isinstance(error, DatasetError):
                self._result.refuse(str(error))
            else:
                self._result.refuse(f"The ZIP file is damaged ({reason_of(error)}). Make it again.")

    def _unpack(self, archive: zipfile.ZipFile, entries: Sequence[tuple[zipfile.ZipInfo, Place | str]]) -> None:
        left = self._limits.set_bytes - self._used.bytes
        for number, (entry, place) in enumerate(sorted(entries, key=lambda each: each[0].filename)):
            if isinstance(place, str):
                self.add(Path(), entry.filename, place)
                continue
            with received_file(self._data_set) as unpacked:
                problem, size = _unpacked(archive, entry, unpacked, min(left, self._limits.file_bytes))
                left -= size
                self._used = Usage(self._used.files + 1, self._used.bytes + size)
                if problem:
                    self._result.refuse(problem)
                else:
                    self.add(unpacked, entry.filename, place)
            if left <= 0 or self._used.files > self._limits.files:
                left_out = counted(len(entries) - number - 1, "file")
                self._result.refuse(f"{left_out} not added, because {full(self._data_set, self._limits)}")
                return


def _unpacked(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, path: Path, most: int) -> tuple[str, int]:
    """Unpack a file of at most `most` bytes. Returns what is wrong with it, and the bytes that were written."""
    name = shown(entry.filename.rpartition("/")[2])
    if entry.flag_bits & _ENCRYPTED or entry.compress_type not in _PACKED:
        return f"{name}: it is encrypted or packed in a rare way. Make the ZIP file again without a password.", 0
    if entry.file_size > most:
        return _too_large(Path(name), most), 0
    written = 0
    try:
        with disk_errors(path), archive.open(entry) as packed, path.open("wb") as file:
            while chunk := packed.read(_CHUNK):
                written += len(chunk)
                if written > most:
                    return _too_large(Path(name), most), written
                if written > max(_RATIO_ABOVE, _MOST_RATIO * entry.compress_size):
                    return (
                        f"{name}: it unpacks to more than {_MOST_RATIO} times its size, so it was not added.",
                        written,
                    )
                file.write(chunk)
    except DiskError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file in it raises almost anything
        return f"{name}: it is damaged in the ZIP file ({reason_of(error)}).", written
    return "", written


class _Listed:
    """A ZIP file whose list of contents is not read if it is too large: zipfile reads it with one call."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.tell, self.close = file.tell, file.close

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_SET and place < 0:  # Python 3.10 does not check this
            raise zipfile.BadZipFile("Bad offset for central directory")
        return self._file.seek(place, whence)

    def read(self, size: int = -1) -> bytes:
        if size > _DIRECTORY_BYTES:
            raise DatasetError("The ZIP file lists too many files. Add the pictures in several ZIP files.")
        return self._file.read(size if size >= 0 else _DIRECTORY_BYTES)

    def seekable(self) -> bool:
        return True


def _too_large(path: Path, most: int) -> str:
    return f"{path}: the file is larger than {size_in_words(max(most, 0))}, so it was not added."


def _same_bytes(path: Path, other: Path) -> bool:
    try:
        if path.stat().st_size != other.stat().st_size:
            return False
        with path.open("rb") as one, other.open("rb") as two:
            while chunk := one.read(_CHUNK):
                if chunk != two.read(_CHUNK):
                    return False
            return True
    except OSError:
        return False
