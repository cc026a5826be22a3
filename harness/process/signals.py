"""Handle SIGTERM (Slurm, systemd, `timeout`, `kill`) and SIGHUP (a closed terminal) like Ctrl-C."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

TERMINATION_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Terminated(KeyboardInterrupt):
    """Raised when a signal requests the end of this process. The exception's text is the name of the signal.

    The class is a KeyboardInterrupt, so that the same handlers catch Ctrl-C and signals.
    """


@contextmanager
def one_interrupt() -> Iterator[None]:
    """Inside the `with` block, only the first SIGINT (Ctrl-C) raises KeyboardInterrupt; later ones are ignored.

    `timeout -s INT` sends two. The second one must not end a command that prints the results so far.
    """
    handler = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.default_int_handler(number, frame)

    if handler is signal.default_int_handler:  # an ignored signal stays ignored
        signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


@contextmanager
def handle_termination() -> Iterator[None]:
    """Raise Terminated inside the `with` block at the first SIGTERM or SIGHUP.

    Later signals are ignored, so that cleanup completes. A signal that was ignored before the block stays ignored, as
    `nohup` requires.
    """
    terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]
    handlers = {number: signal.getsignal(number) for number in TERMINATION_SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    def stop(number: int, _: object) -> None:
        for each in handlers:
            signal.signal(each, signal.SIG_IGN)
        if number == signal.SIGHUP:
            # Writing to a closed terminal raises an error, which would interrupt the cleanup.
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
