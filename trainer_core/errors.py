"""Errors that the user can fix. A message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class TrainerError(Exception):
    """Base of all errors that the user can fix. Anything else that is raised is a bug."""


class ConfigError(TrainerError, ValueError):
    """A setting is wrong."""


class DatasetError(TrainerError, ValueError):
    """A dataset can't be used. `problems` lists every problem found, one line each.

    `notes` are no problems, but may explain them, such as files that are not used.
    """

    def __init__(self, summary: str, problems: Sequence[str] = (), notes: Sequence[str] = ()) -> None:
        self.summary = summary
        self.problems, self.notes = tuple(problems), tuple(notes)
        lines = [summary, *(f"  - {problem}" for problem in self.problems)]
        lines += ["Notes:", *(f"  - {note}" for note in self.notes)] if self.notes else []
        super().__init__("\n".join(lines))


class ModelFileError(TrainerError, ValueError):
    """A model folder or file is missing, damaged or of the wrong kind."""


class DamagedFileError(TrainerError, ValueError):
    """A file that the trainer wrote was changed or cut short since."""


class RunFolderError(TrainerError, ValueError):
    """A run folder is damaged, in use, or belongs to another run."""


class ExportError(TrainerError, RuntimeError):
    """The LoRA file failed its check in another program's loader and was not saved."""


class NonFiniteLossError(TrainerError, ArithmeticError):
    """The loss or a gradient became NaN or infinite. The weights are still those of the last good step."""


class OutOfMemoryError(TrainerError, MemoryError):
    """The accelerator ran out of memory. The run is saved up to its last step or checkpoint."""


class MissingPackageError(TrainerError, ImportError):
    """A setting needs an optional package that is not installed."""

    def __init__(self, package: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package}, which is not installed in this Python. "
            f"Install it with: python -m pip install {package}"
        )


class PackageError(TrainerError, ImportError):
    """Installed packages are missing, too old, or don't work together. `command` mends it."""

    def __init__(self, problems: Sequence[str], command: str) -> None:
        listed = "\n".join(f"  - {problem}" for problem in problems)
        super().__init__(
            f"The packages in this Python don't fit, perhaps because another program changed them:\n{listed}\n"
            f"Run this command, then start again:\n  {command}"
        )


class DiskError(TrainerError, OSError):
    """A file can't be written or read, because the disk is full, read-only or failing, or the name is too long.

    `errno` is that of the system's error.
    """

    def __init__(self, message: str, errno: int | None) -> None:
        super().__init__(message)
        self.errno, self.strerror = errno, message

    def __str__(self) -> str:
        return str(self.strerror)  # without the number that OSError puts in front


class JobError(TrainerError, ValueError):
    """Several checks of a job failed. `errors` holds their errors."""

    def __init__(self, errors: Sequence[TrainerError]) -> None:
        self.errors = tuple(errors)
        super().__init__(listed(errors))


class SettingsError(ConfigError):
    """Several settings are wrong. `errors` holds their errors."""

    def __init__(self, errors: Sequence[TrainerError]) -> None:
        self.errors = tuple(errors)
        super().__init__(listed(errors))


def split(error: TrainerError) -> tuple[TrainerError, ...]:
    """The errors of a JobError or SettingsError; any other error alone."""
    return error.errors if isinstance(error, JobError | SettingsError) else (error,)


def listed(errors: Sequence[TrainerError | str]) -> str:
    """The message of several errors, each with its number."""
    lines = (f"{number}. {error}" for number, error in enumerate(errors, 1))
    return "\n".join([f"There are {len(errors)} problems. Fix them and run again:", *lines])


class Interrupted(TrainerError):
    """The user asked to stop. All finished work is on disk; the same call resumes from there.

    With `keep`, the user wants the training to end here and export a LoRA of the finished steps, not to pause.
    """

    def __init__(
        self, message: str = "Stopped. Finished work is saved; run again to resume.", *, keep: bool = False
    ) -> None:
        self.keep = keep
        super().__init__(message)


class LostRankError(TrainerError, RuntimeError):
    """Another process of a distributed training has ended or hangs. The run's last checkpoint is kept."""


class Problems:
    """Collects the errors of several checks, so that the user sees all of them at once."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[TrainerError, list[str]]] = {}  # by message: the error, and where it was found

    @property
    def errors(self) -> tuple[TrainerError, ...]:
        """Each error once, in the order in which they were found. Its message names all parts that it was found in."""
        return tuple(
            _about(error, ", ".join(dict.fromkeys(places))) if all(places) else error
            for error, places in self._found.values()
        )

    def attempt(self, check: Callable[[], T], where: str = "") -> T | None:
        """The result of `check`, or None if it raises an error that the user can fix. `Interrupted` is passed on.

        `where` names the part of the job that the error is about.
        """
        try:
            return check()
        except Interrupted:
            raise
        except TrainerError as error:
            self.add(error, where)
            return None

    def add(self, error: TrainerError, where: str = "") -> None:
        """Add an error, or those of a JobError or SettingsError. `where` is as in `attempt`."""
        for each in split(error):
            _, places = self._found.setdefault(str(each), (each, []))
            places.append(where)

    def raise_all(self, several: type[JobError] | type[SettingsError] = JobError) -> None:
        """Raise the error if there is one, or `several` of them as one."""
        errors = self.errors
        if len(errors) == 1:
            raise errors[0]
        if errors:
            raise several(errors)


def _about(error: TrainerError, where: str) -> TrainerError:
    """The error with `where` in front, if it is about a setting or a dataset."""
    if isinstance(error, DatasetError):
        return DatasetError(f"{where}: {error.summary}", error.problems, error.notes)
    return ConfigError(f"{where}: {error}") if isinstance(error, ConfigError) else error
