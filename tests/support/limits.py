"""What every property of handed-in files asserts: a result or our own error, in bounded time and memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TypeVar

import psutil

from trainer_core.errors import TrainerError

T = TypeVar("T")
_MEBIBYTE = 2**20
_LONGEST_MESSAGE = 20_000


def result_or_own_error(call: Callable[[], T], *, seconds: float = 5.0, mebibytes: int = 300) -> T | TrainerError:
    """The result of `call`, or the TrainerError that it raised. Any other exception fails the test as it is.

    Asserts that the call takes at most `seconds` of processor time and raises the peak of this process's memory by at
    most `mebibytes`, and that an error's message can be encoded as UTF-8 and has a bounded length.
    """
    time_before, memory_before = time.process_time(), _peak()
    try:
        result: T | TrainerError = call()
    except TrainerError as error:
        result = error
    if isinstance(result, TrainerError):
        assert 0 < len(str(result).encode()) < _LONGEST_MESSAGE, "the message repeats what was handed in"
    assert time.process_time() - time_before < seconds
    assert (_peak() - memory_before) / _MEBIBYTE < mebibytes
    return result


def _peak() -> int:
    """The most memory that this process has had, in bytes."""
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
