"""Errors that the user can fix. A message says what is wrong, where, and what to do."""

from __future__ import annotations

from collections.abc import Sequence


class TrainerError(Exception):
    """Base of all errors that the user can fix. Anything else that is raised is a bug."""


class ConfigError(TrainerError, ValueError):
    """A setting is wrong."""


class DatasetError(TrainerError, ValueError):
    """A dataset can't be used. `problems` lists every problem found, one line each."""

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        self.summary = summary
        self.problems = tuple(problems)
        super().__init__("\n".join([summary, *(f"  - {problem}" for problem in self.problems)]))


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
