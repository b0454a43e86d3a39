"""Checks the installed packages against requirements.txt before anything is computed.

Other programs in the same Python may install older versions, or versions that don't work together.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING

from .errors import MissingPackageError, PackageError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

REQUIREMENTS = Path(__file__).parent.parent / "requirements.txt"
# Packages that only some settings need. `check_package` is called where one of them is used.
_OPTIONAL = frozenset({"optimum-quanto", "bitsandbytes", "prodigyopt", "schedulefree", "lion-pytorch"})
# Shown when a library can't be imported: packages that must fit together.
_RELATED = ("torch", "torchvision", "transformers", "diffusers", "peft", "huggingface_hub", "torchao", "bitsandbytes")
_IMPORTING = RLock()
_COMMENT = re.compile(r"(^|\s)#.*")


@cache
def check_packages() -> None:
    """Check that the packages that every command needs are installed and new enough, once per process.

    Reads the packages' metadata and imports none of them.

    Raises:
        PackageError: lists what was found, what is needed, and the command that mends it.
    """
    needed = (each for each in requirements() if each.name not in _OPTIONAL)
    if problems := [problem for each in needed if (problem := _problem(each))]:
        raise PackageError(problems, _command())


def check_package(name: str) -> None:
    """Check that an optional package is new enough, if it is installed.

    Raises:
        PackageError: it is too old.
    """
    requirement = next((each for each in requirements() if each.name == name), None)
    if requirement is not None and _version(name) and (problem := _problem(requirement)):
        raise PackageError([problem], _command())


def need_triton(needed_for: str) -> None:
    """Check that Triton is installed, which only some settings need.

    Raises:
        MissingPackageError: it is not.
    """
    if find_spec("triton") is None:
        raise MissingPackageError("triton-windows" if sys.platform == "win32" else "triton", needed_for)


@cache
def requirements() -> tuple[Requirement, ...]:
    """The packages in requirements.txt that this system needs, with their bounds."""
    from packaging.requirements import Requirement

    lines = (_COMMENT.sub("", line).strip() for line in REQUIREMENTS.read_text(encoding="utf-8").splitlines())
    found = [Requirement(line) for line in lines if line]
    return tuple(each for each in found if each.marker is None or each.marker.evaluate())


def _problem(requirement: Requirement) -> str:
    """What is wrong with a package; empty if it is fine."""
    found, needed = _version(requirement.name), f"{requirement.name}{requirement.specifier}"
    if found:
        fits = requirement.specifier.contains(found, prereleases=True)
        return "" if fits else f"{needed} is needed, but {found} is installed"
    is_there = find_spec(requirement.name) is not None  # copied without its metadata, so the version is unknown
    return "" if is_there else f"{needed} is needed, but it is not installed"


def _version(package: str) -> str:
    """The installed version; empty if the package is missing, or its metadata is damaged."""
    try:
        return metadata.version(package) or ""
    except (metadata.PackageNotFoundError, KeyError):
        return ""


def _command() -> str:
    return f'"{sys.executable}" -m pip install -r "{REQUIREMENTS}"'


@contextmanager
def explained_imports(package: str) -> Iterator[None]:
    """Turns an error while a library is imported into one that names the installed versions.

    Only one thread is in such a context at a time. diffusers and transformers import their parts when they are first
    asked for, in circles: a second thread would find half of a module, and fail for no fault of the packages.

    Raises:
        PackageError: the import failed, usually because packages don't fit together.
    """
    with _IMPORTING:
        try:
            # Another extension's thread may be importing the package too. `from package import name` would take the
            # module as it is before its end, where it replaces itself; `import_module` waits and takes the new one.
            import_module(package)
            yield
        except (ImportError, RuntimeError, AttributeError) as error:
            problems = [f"{package} can't be imported: {_first_line(error)}", *conflicts()]
            raise PackageError(problems, _command()) from error


def conflicts(packages: Sequence[str] = ("diffusers", "transformers", "peft")) -> list[str]:
    """Sentences on what these packages need but is installed in another version, and a list of related packages."""
    found: list[str] = []
    for package in packages:
        for line in _stated(package):
            version = _version(line.name)
            if version and not line.specifier.contains(version, prereleases=True):
                found.append(f"{package} needs {line.name}{line.specifier}, but {version} is installed")
    versions = ", ".join(f"{name} {version}" for name in _RELATED if (version := _version(name)))
    return [*found, f"installed: {versions}"]


def _stated(package: str) -> list[Requirement]:
    """What a package's metadata says it needs, without extras."""
    from packaging.requirements import InvalidRequirement, Requirement

    found: list[Requirement] = []
    lines = metadata.requires(package) if _version(package) else None
    for line in lines or ():
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


def _first_line(error: BaseException) -> str:
    while error.__cause__ is not None:  # diffusers and transformers wrap the error of the module that failed
        error = error.__cause__
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
