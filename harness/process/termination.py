"""Signals that end a run as Ctrl-C does: SIGTERM (of Slurm, systemd, `timeout`, `kill`) and SIGHUP (of a lost terminal)."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

ASKING = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """Somebody asked this process to end, by the signal that is its text; whoever handles Ctrl-C handles this too."""


@contextmanager
def on_request() -> Iterator[None]:
    """Raise Terminated in the block on the first such signal; further ones must not cut the clean end short.

    A signal that is ignored already stays so: `nohup` asks for that.
    """
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    heard = {number: signal.getsignal(number) for number in ASKING}
    heard = {number: handler for number, handler in heard.items() if handler is not signal.SIG_IGN}

    def stop(number: int, _: object) -> None:
        for each in heard:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGHUP:
            # To write to a terminal that is gone is an error, and would be the end of the clean end.
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        raise Terminated(signal.Signals(number).name)

    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
