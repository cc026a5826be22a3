"""A worker dies with its runner, however the runner dies."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading

_PR_SET_PDEATHSIG = 1


def hold(descriptor: int) -> None:
    """Kill this process and its children when the other end of the pipe `descriptor` is gone.

    A killed runner closes the pipe whatever killed it. On Linux the kernel sends SIGKILL as well, which also works while
    this process is stuck in C code.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_wait, args=(descriptor,), daemon=True, name="lifeline").start()


def _wait(descriptor: int) -> None:
    os.read(descriptor, 1)  # nothing is ever written: this returns when the pipe closes
    os.killpg(os.getpgid(0), signal.SIGKILL)
