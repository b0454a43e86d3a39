"""The lock of a run folder: one process at a time trains in it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import RunFolderError
from ..text import reason_of

LOCK = "run.lock"
_LOCK_SECONDS = 1  # `is_in_use` of another process holds the lock for a moment
_LOOKING = threading.Lock()
_LOG = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[bool]:
    """Hold the folder's lock. The system releases it however the process ends. Yields False on a drive without locks.

    Raises:
        RunFolderError: another process holds it.
    """
    lock = FileLock(path / LOCK)
    try:
        lock.acquire(timeout=_LOCK_SECONDS)
    except Timeout as error:
        raise RunFolderError(
            f"The run folder {path} is in use by another training run. Wait until it ends, stop it, or choose another "
            f"name. If no training is running on any machine, delete {LOCK} in the folder. Nothing was changed."
        ) from error
    except (OSError, NotImplementedError) as error:  # some network drives
        _LOG.warning(
            "The run folder %s can't be locked (%s). Make sure that no other run uses it.", path, reason_of(error)
        )
    try:
        yield lock.is_locked
    finally:
        lock.release()


def is_in_use(path: Path) -> bool:
    """Whether a training, in this process or another, holds the lock of the run folder."""
    place = path / LOCK
    if place.is_symlink() or not place.is_file():
        return False
    lock = FileLock(place)
    with _LOOKING:  # two pages may look at once, and must not take each other for a training
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return True
        except (OSError, NotImplementedError):
            return False
        lock.release()
    return False
