"""How a child process reports to the one that started it: JSON lines on a pipe, out of reach of what a plug-in prints."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from harness.process import lifeline


class Say(Protocol):
    """Reports one event."""

    def __call__(self, **event: Any) -> None:
        """Write the event as one JSON line."""


@contextmanager
def speaker(fd: int, line: int) -> Iterator[Say]:
    """Send stdout to stderr, also what a C library prints, and give a function that reports on the descriptor `fd`.

    A plug-in that forks inherits both; what its child then reports is not heard. The process dies with the one that
    holds the other end of the pipe `line`. The last event is `done`: the process that sees to that.
    """
    watcher = lifeline.hold(line, fd)
    os.dup2(2, 1)
    os.set_inheritable(fd, False)
    os.set_inheritable(line, False)
    mine = os.getpid()
    with os.fdopen(fd, "w", encoding="utf-8") as events:

        def say(**event: Any) -> None:
            if os.getpid() == mine:
                events.write(json.dumps(event) + "\n")
                events.flush()

        yield say
        say(done=watcher)
