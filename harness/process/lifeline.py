"""A pipe that ends a worker and its children when the worker's parent has ended.

As a script, `lifeline.py DESCRIPTOR COMMAND...` starts to watch the pipe, and then becomes the command. So the command
itself need not know of the pipe.
"""

from __future__ import annotations

import os
import signal
import sys


def die_with_parent(lifeline: int, *others: int) -> int:
    """Start a process that kills this process group when the other end of the pipe `lifeline` closes; return its id.

    The pipe closes when the parent ends in any way, even before this call. A thread of the worker could not watch the
    pipe. It would not run while a library holds the interpreter. And if the worker were killed, the thread would end
    before it could kill the worker's children. others: descriptors that the watching process must not hold open.
    """
    if watcher := os.fork():
        return watcher
    try:
        for other in others:
            os.close(other)
        os.read(lifeline, 1)  # no process writes to the pipe: this returns when the pipe closes
    finally:
        os.killpg(0, signal.SIGKILL)
    raise SystemExit  # unreachable: the process has killed itself


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  # the command of this process's parent
