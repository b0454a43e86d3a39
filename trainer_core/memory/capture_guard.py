"""Notices when a capture of CUDA graphs has ended the program, so that the next start does without them.

With cudaMallocAsync, torch ends the process if something goes wrong with the memory of a capture.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from .compilation import code_folder

_WAIT_SECONDS = 60  # for another process that captures
_UNUSABLE = (OSError, RuntimeError, NotImplementedError, Timeout)  # no folder, no permission, no locks, or held


@contextmanager
def noted_capture() -> Iterator[None]:
    """A context for a capture. Leaves a file behind if the program ends in it."""
    held = ExitStack()
    with suppress(*_UNUSABLE):  # without the file, nothing is noticed
        note = _note()
        note.parent.mkdir(parents=True, exist_ok=True)
        held.enter_context(_lock(note).acquire(timeout=_WAIT_SECONDS))
        note.touch()
        held.callback(_delete, note)
    with held:
        yield


def _delete(note: Path) -> None:
    with suppress(OSError):
        note.unlink()


def unfinished_capture() -> Path | None:
    """The file of a capture that has ended the program; None if there is none."""
    with suppress(*_UNUSABLE):
        note = _note()
        if note.exists():
            with _lock(note).acquire(timeout=0):  # else a process captures right now
                return note if note.exists() else None
    return None


def _note() -> Path:
    """One for each version of torch: another one may not fail."""
    return code_folder().parent / f"capturing-{torch.__version__}"


def _lock(note: Path) -> FileLock:
    return FileLock(note.with_name(f"{note.name}.lock"))
