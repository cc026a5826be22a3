"""A worker dies with its runner, and takes its children along, however the runner dies."""

from __future__ import annotations

import os
import signal


def hold(descriptor: int, *others: int) -> int:
    """Kill this process group when the other end of the pipe `descriptor` is gone; return the process that waits for that.

    A killed runner closes the pipe whatever killed it, also one that is gone already. A small process of its own waits
    for that: a thread of the worker would not run while a library holds the interpreter, and would be killed together
    with the worker before it could reach the worker's children. `others` are descriptors that it must not hold open.
    """
    if watcher := os.fork():
        return watcher
    try:
        for other in others:
            os.close(other)
        os.read(descriptor, 1)  # nothing is ever written: this returns when the pipe closes
    finally:
        os.killpg(0, signal.SIGKILL)
    raise SystemExit  # never: it has killed itself
