"""Checks of names and folders from workflows, which are untrusted: anyone may have written them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..trainer_core.disk import is_device_name
from ..trainer_core.errors import ConfigError
from ..trainer_core.text import brief
from ..trainer_core.written_path import written_path

_RUN_NAME = re.compile(r"\w[\w .+-]{0,79}")
_RUN_NAME_BYTES = 200  # file names have at most 255, with what is added to a run's name
_NEVER_IN_NAMES = re.compile(r"[\x00\ud800-\udfff]")  # rejected by system calls and encodings
_HOW_TO_ALLOW = (
    "To allow other folders, list them under qwen_edit_datasets in extra_model_paths.yaml or in the environment "
    "variable QWEN_EDIT_DATASET_ROOTS, then restart ComfyUI."
)


def checked_run_name(name: str, label: str = "run_name") -> str:
    """`name`, if it can be used as the name of a folder and a file. `label` is what the page calls it.

    Raises:
        ConfigError: the name is not allowed.
    """
    if not name.strip():
        raise ConfigError(f"{label} is empty. Enter a name, such as my_edit.")
    fits = _RUN_NAME.fullmatch(name) and name[-1] not in " ." and not is_device_name(name)
    if not fits or len(name.encode()) > _RUN_NAME_BYTES:
        raise ConfigError(
            f"{label} can't be {brief(name)}. Use 1 to 80 letters, digits, spaces and _ - + . (at most "
            f"{_RUN_NAME_BYTES} bytes). Start with a letter, digit or _. Don't end with a dot or space. Names that "
            "Windows reserves, such as CON, are not allowed."
        )
    return name


def free_name(folder: Path, name: str) -> str:
    """The first of `name`, `name-2`, `name-3`, ... that does not exist in `folder`."""
    candidate, number = name, 1
    while (folder / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def folder_below(name: str, roots: Mapping[str, Path], label: str) -> Path:
    """Real path of the existing folder `name`, which is relative to a root or absolute inside a root.

    Raises:
        ConfigError: not found, or outside all roots (also through a symbolic link). Names the roots, not their paths.
    """
    return folders_below({label: name}, roots)[label]


def folders_below(named: Mapping[str, str], roots: Mapping[str, Path]) -> dict[str, Path]:
    """`folder_below` for several names by label.

    Raises:
        ConfigError: lists every name that is not found or outside all roots.
    """
    found: dict[str, Path] = {}
    wrong = []
    for label, name in named.items():
        folder = _folder_or_reason(name.strip(), roots)
        if isinstance(folder, Path):
            found[label] = folder
        else:
            wrong.append(f"{label} is {brief(name.strip())}, which {folder}.")
    if wrong:
        what, its = ("the folder", "its path") if len(wrong) == 1 else ("the folders", "their paths")
        allowed = (
            f"Put {what} into one of the folders {', '.join(roots)}. Write {its} from there, such as my_edit/target. "
            f"{_HOW_TO_ALLOW}"
        )
        raise ConfigError(" ".join([*wrong, allowed]))
    return found


def _folder_or_reason(name: str, roots: Mapping[str, Path]) -> Path | str:
    """Real path of the folder, or the reason why the name is rejected, as the end of a sentence."""
    if not _is_path_of_names(name):
        return "is not a folder name"
    candidates = [Path(name)] if _is_absolute(name) else [written_path(name, root) for root in roots.values()]
    folder = next((path for path in candidates if _is_below(path, roots) and _is_there(path.is_dir)), None)
    if folder is not None:
        return Path(os.path.realpath(folder))
    outside = not all(_is_below(path, roots) for path in candidates)
    return "lies outside the allowed folders" if outside else "does not exist"


def file_below(name: str, folder: Path, roots: Mapping[str, Path], label: str) -> Path:
    """Real path of the existing file `name`, which is relative to `folder` or absolute, and inside a root.

    Raises:
        ConfigError: not found, or outside all roots (also through a symbolic link). Names the roots, not their paths.
    """
    name = name.strip()
    unusable = not name or _NEVER_IN_NAMES.search(name) or name.startswith(("\\\\", "//", "~"))
    path = folder if unusable else written_path(name, folder)
    if unusable or not _is_below(path, roots):
        reason = "is not a file in an allowed folder"
    elif not _is_there(path.is_file):
        reason = "does not exist"
    else:
        return Path(os.path.realpath(path))
    raise ConfigError(
        f"{label} is {brief(name)}, which {reason}. Use a file in the target folder or below one of: "
        f"{', '.join(roots)}. {_HOW_TO_ALLOW}"
    )


def file_below_roots(name: str, roots: Mapping[str, Path], label: str) -> Path:
    """Real path of the existing file `name`, which is relative to a root or absolute inside a root.

    Raises:
        ConfigError: not found, or outside all roots (also through a symbolic link). Names the roots, not their paths.
    """
    folder, _, file = name.strip().replace("\\", "/").rpartition("/")
    places = [root / folder for root in roots.values() if not folder] or [folder_below(folder, roots, label)]
    there = (place for place in places if file and _is_path_of_names(file) and _is_there((place / file).is_file))
    return file_below(file, next(there, places[0]), roots, label)


def strays(folder: Path, names: Iterable[str]) -> str:
    """The first of these files and folders below `folder` that leads outside it through a link, or is a pipe or
    device; empty if there is none."""
    real = os.path.realpath(folder)
    for name in names:
        path = Path(os.path.realpath(folder / name))
        if not path.is_relative_to(real) or (path.exists() and not (path.is_file() or path.is_dir())):
            return name
    return ""


def near(name: str, folder: Path, roots: Mapping[str, Path], kind: Callable[[Path], bool]) -> str:
    """Absolute path of a relative `name` found in `folder` or a parent of it inside a root; otherwise `name` itself.

    The result is still untrusted: pass it to `folder_below` or `file_below`.
    """
    if _is_path_of_names(name.strip()) and not _is_absolute(name.strip()):
        for place in (folder, *folder.parents):
            if not _is_below(place, roots):
                break
            path = written_path(name.strip(), place)
            if _is_below(path, roots) and _is_there(lambda path=path: kind(path)):
                return str(path)
    return name


def _is_path_of_names(name: str) -> bool:
    """Whether the path has no `..`, network or home directory part."""
    hostile = ".." in re.split(r"[/\\]", name) or name.startswith(("\\\\", "//", "~"))
    return bool(name) and not _NEVER_IN_NAMES.search(name) and not hostile


def _is_absolute(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).drive or PureWindowsPath(name).root)


def _is_there(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # the name is too long for the file system
        return False


def _is_below(path: Path, roots: Mapping[str, Path]) -> bool:
    """Whether the real path is a root or inside one."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots.values())
