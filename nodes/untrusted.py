"""Names and folders that come from a workflow, which a stranger may have written."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..trainer_core.errors import ConfigError

_RUN_NAME = re.compile(r"\w[\w .+-]{0,79}")
_NEVER_IN_NAMES = re.compile(r"[\x00\ud800-\udfff]")  # the systems' calls and encodings refuse them
_WINDOWS_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


_HOW_TO_ALLOW = (
    "Whoever runs ComfyUI can allow more: folders under the key qwen_edit_datasets in extra_model_paths.yaml, or in "
    "the environment variable QWEN_EDIT_DATASET_ROOTS."
)


def checked_run_name(name: str) -> str:
    """`name`, which will be a folder and a file.

    Raises:
        ConfigError: not a plain name.
    """
    fits = _RUN_NAME.fullmatch(name) and name[-1] not in " ." and name.split(".")[0].upper() not in _WINDOWS_DEVICES
    if not fits:
        raise ConfigError(
            f"run_name is {name[:100]!r}; allowed is a name of 1 to 80 letters, digits, spaces and _ - + . that starts "
            "with a letter, a digit or _ and does not end in a dot or a space. It names a folder, it is not a path."
        )
    return name


def free_name(folder: Path, name: str) -> str:
    """`name`, or `name-2`, `name-3`, ... : the first that `folder` does not hold yet."""
    candidate, number = name, 1
    while (folder / candidate).exists():
        number += 1
        candidate = f"{name}-{number}"
    return candidate


def folder_below(name: str, roots: Mapping[str, Path], label: str) -> Path:
    """The existing folder that `name` means: relative to the first root that has it, or absolute inside a root.

    Raises:
        ConfigError: not there, or outside all roots (also by a symbolic link). Names the roots, not where they lie.
    """
    return folders_below({label: name}, roots)[label]


def folders_below(named: Mapping[str, str], roots: Mapping[str, Path]) -> dict[str, Path]:
    """`folder_below` for several names by their labels.

    Raises:
        ConfigError: with all of them that are not there or outside all roots.
    """
    found: dict[str, Path] = {}
    wrong = []
    for label, name in named.items():
        folder = _folder_or_reason(name.strip(), roots)
        if isinstance(folder, Path):
            found[label] = folder
        else:
            wrong.append(f"{label} is {name.strip()[:200]!r}, which {folder}.")
    if wrong:
        allowed = f"Allowed is a folder below one of: {', '.join(roots)}. {_HOW_TO_ALLOW}"
        raise ConfigError(" ".join([*wrong, allowed]))
    return found


def _folder_or_reason(name: str, roots: Mapping[str, Path]) -> Path | str:
    """The folder's real place, or what is wrong with the name, as the rest of a sentence."""
    if not _is_path_of_names(name):
        return "is not a folder name"
    candidates = [Path(name)] if _is_absolute(name) else [root / name for root in roots.values()]
    folder = next((path for path in candidates if _is_below(path, roots) and _is_there(path.is_dir)), None)
    if folder is not None:
        return Path(os.path.realpath(folder))
    outside = not all(_is_below(path, roots) for path in candidates)
    return "lies outside the allowed folders" if outside else "is not there"


def file_below(name: str, folder: Path, roots: Mapping[str, Path], label: str) -> Path:
    """The existing file that `name` means: relative to `folder`, or absolute; inside a root either way.

    Raises:
        ConfigError: not there, or outside all roots (also by a symbolic link). Names the roots, not where they lie.
    """
    name = name.strip()
    path = folder / name
    unusable = not name or _NEVER_IN_NAMES.search(name) or name.startswith(("\\\\", "//", "~"))
    if unusable or not _is_below(path, roots):
        reason = "is not a file in an allowed folder"
    elif not _is_there(path.is_file):
        reason = "is not there"
    else:
        return Path(os.path.realpath(path))
    raise ConfigError(
        f"{label} is {name[:200]!r}, which {reason}. Allowed is a file below the target folder, or one below: "
        f"{', '.join(roots)}. {_HOW_TO_ALLOW}"
    )


def file_below_roots(name: str, roots: Mapping[str, Path], label: str) -> Path:
    """The existing file that `name` means: relative to the first root that has it, or absolute inside a root.

    Raises:
        ConfigError: not there, or outside all roots (also by a symbolic link). Names the roots, not where they lie.
    """
    folder, _, file = name.strip().replace("\\", "/").rpartition("/")
    places = [root / folder for root in roots.values() if not folder] or [folder_below(folder, roots, label)]
    there = (place for place in places if file and _is_path_of_names(file) and _is_there((place / file).is_file))
    return file_below(file, next(there, places[0]), roots, label)


def near(name: str, folder: Path, roots: Mapping[str, Path], kind: Callable[[Path], bool]) -> str:
    """A relative `name` as an absolute path if `folder`, or one above it inside a root, has it; else as it is.

    The result is a name from a stranger still: `folder_below` and `file_below` decide whether it is allowed.
    """
    if _is_path_of_names(name.strip()) and not _is_absolute(name.strip()):
        for place in (folder, *folder.parents):
            if not _is_below(place, roots):
                break
            path = place / name.strip()
            if _is_below(path, roots) and _is_there(lambda path=path: kind(path)):
                return str(path)
    return name


def _is_path_of_names(name: str) -> bool:
    """Nothing in it that leads up, to another machine or to a home."""
    hostile = ".." in re.split(r"[/\\]", name) or name.startswith(("\\\\", "//", "~"))
    return bool(name) and not _NEVER_IN_NAMES.search(name) and not hostile


def _is_absolute(name: str) -> bool:
    return PurePosixPath(name).is_absolute() or bool(PureWindowsPath(name).drive or PureWindowsPath(name).root)


def _is_there(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:  # a longer name than the file system has
        return False


def _is_below(path: Path, roots: Mapping[str, Path]) -> bool:
    """True if the real place of `path` is one of the roots or inside it."""
    real = Path(os.path.realpath(path))
    return any(real.is_relative_to(os.path.realpath(root)) for root in roots.values())
