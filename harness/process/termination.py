"""Handle SIGTERM (Slurm, systemd, `timeout`, `kill`) and SIGHUP (a closed terminal) as Ctrl-C is handled."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end; its text is the signal's name. A KeyboardInterrupt, so that both are one case."""


@contextmanager
def handle_termination() -> Iterator[None]:
    """Raise Terminated in the block on the first such signal, and ignore further ones, so that the clean end completes.

    A signal that is ignored already stays ignored: `nohup` sets that.
    """
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    handlers = {number: signal.getsignal(number) for number in TERMINATION_SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def stop(number: int, _: object) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGHUP:
            # A write to a terminal that is gone is an error, and would break the clean end off.
            for descriptor in terminals:
                os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
        raise Terminated(signal.Signals(number).name)

    for number in handlers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
