"""A pipe that ends a worker and its children when the worker's parent has ended.

As a script, `lifeline.py DESCRIPTOR COMMAND...` starts to watch the pipe, and then becomes the command. So the command
itself need not know of the pipe.
"""

from __future__ import annotations

import os
import sys

_SHELL = "/bin/sh"
_WATCH = "trap '' HUP INT TERM; read -r _; kill -KILL 0"
"""Shell script that reads its standard input until it ends, and then kills its process group. No process writes to this
input. Signals that a worker may handle do not end the shell."""


def die_with_parent(lifeline: int, *others: int) -> int:
    """Start a process that kills this process group when the other end of the pipe `lifeline` closes; return its id.

    The pipe closes when the parent ends in any way, even before this call. A thread of the worker could not watch the
    pipe. It would not run while a library holds the interpreter. And if the worker were killed, the thread would end
    before it could kill the worker's children. others: descriptors that the watching process must not hold open.

    The watching process is a shell, because a fork of a worker with torch would first copy its page tables, which takes
    15 ms.
    """
    quiet = [(os.POSIX_SPAWN_OPEN, stream, os.devnull, os.O_WRONLY, 0) for stream in (1, 2)]
    closed = [(os.POSIX_SPAWN_CLOSE, one) for one in {lifeline, *others} if one > 2]  # not a stream
    actions = [(os.POSIX_SPAWN_DUP2, lifeline, 0), *quiet, *closed]
    return os.posix_spawn(_SHELL, [_SHELL, "-c", _WATCH], {}, file_actions=actions)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.argv[2], sys.argv[2:])  # noqa: S606  # the command of this process's parent
