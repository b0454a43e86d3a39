"""A program that kills itself: python -m tests.support.killed FUNCTION TIMES CALLS MODULE [ARGUMENT ...]

Runs MODULE as a program. When functions named FUNCTION have been called TIMES times, in any thread, it counts CALLS
further calls of Python functions and sends itself SIGKILL. So the moment doesn't depend on the load of the machine, as
it would if another process waited for a sign and then sent the signal.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
from types import FrameType


def kill_at(function: str, times: int, calls: int) -> None:
    """Send SIGKILL to this process at that moment. Threads that exist already are not counted."""
    left = [times, calls]

    def count(frame: FrameType, event: str, _: object) -> None:
        if event != "call":
            return
        if left[0] > 0:
            left[0] -= frame.f_code.co_name == function
        elif left[1] > 0:
            left[1] -= 1
        else:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(count)
    sys.setprofile(count)


if __name__ == "__main__":
    name, number, further, module, *arguments = sys.argv[1:]
    sys.argv = [module, *arguments]
    kill_at(name, int(number), int(further))
    runpy.run_module(module, run_name="__main__", alter_sys=True)
