"""What can go wrong in a way the user can mend. A message names the thing, its value, what is allowed, what to do."""

from __future__ import annotations

from collections.abc import Sequence


class TrainerError(Exception):
    """Base of all errors a user can mend."""


class ConfigError(TrainerError, ValueError):
    """A setting is wrong."""


class DatasetError(TrainerError, ValueError):
    """A dataset can't be used. `problems` has one line per problem, all of them."""

    def __init__(self, summary: str, problems: Sequence[str] = ()) -> None:
        self.summary = summary
        self.problems = tuple(problems)
        super().__init__("\n".join([summary, *(f"  - {problem}" for problem in self.problems)]))


class ModelFileError(TrainerError, ValueError):
    """A model folder or file is missing, of another kind, or damaged."""


class RunFolderError(TrainerError, ValueError):
    """A run folder belongs to another run, is in use, or is damaged."""


class ExportError(TrainerError, RuntimeError):
    """The LoRA file would not load elsewhere, so it was not given its name."""


class NonFiniteLossError(TrainerError, ArithmeticError):
    """Loss or gradient became NaN or infinite; the weights are still those of the last good step."""


class OutOfMemoryError(TrainerError, MemoryError):
    """The accelerator's memory is too small for what was asked; the run is kept up to its last step or checkpoint."""


class MissingPackageError(TrainerError, ImportError):
    """An optional package is needed for the chosen setting."""

    def __init__(self, package: str, needed_for: str) -> None:
        super().__init__(
            f"{needed_for} needs the package {package}, which is not installed in this Python. "
            f"Install it with: python -m pip install {package}"
        )


class Interrupted(TrainerError):
    """The user asked to stop. What was done so far is on disk, and the same call goes on from there.

    `keep`: the user wants a training to end here with a LoRA of the steps done, instead of a pause.
    """

    def __init__(
        self, message: str = "Stopped. What is finished is kept; run the same again to go on.", *, keep: bool = False
    ) -> None:
        self.keep = keep
        super().__init__(message)


class LostRankError(TrainerError, RuntimeError):
    """One of several processes that train together is gone. The run's last checkpoint is kept."""
