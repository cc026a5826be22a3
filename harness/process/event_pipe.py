"""The pipe through which a worker process sends events as JSON lines. What plug-ins print does not enter this pipe."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from harness.process.lifeline import die_with_parent


class EventWriter(Protocol):
    """A function that reports one event."""

    def __call__(self, **event: Any) -> None:
        """Write the event as one JSON line."""


@contextmanager
def event_writer(events: int, lifeline: int) -> Iterator[EventWriter]:
    """Yield a function that writes events to the descriptor `events`. Redirect stdout to stderr, also for C libraries.

    If a plug-in forks this process, the events of the fork are dropped. This process is killed when the other end of
    the pipe `lifeline` closes. The last event is `done`, with the id of the process that watches the lifeline.
    """
    watcher = die_with_parent(lifeline, events)
    os.dup2(2, 1)
    os.set_inheritable(events, False)
    os.set_inheritable(lifeline, False)
    own = os.getpid()
    with os.fdopen(events, "w", encoding="utf-8") as pipe:

        def emit(**event: Any) -> None:
            if os.getpid() == own:
                pipe.write(json.dumps(event) + "\n")
                pipe.flush()

        yield emit
        emit(done=watcher)
