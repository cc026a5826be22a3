"""SIGTERM ends a run as Ctrl-C does: it is what Slurm, systemd, `timeout` and a plain `kill` send."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Terminated(KeyboardInterrupt):
    """Somebody asked this process to end; whoever handles Ctrl-C handles this too."""


@contextmanager
def on_sigterm() -> Iterator[None]:
    """Raise Terminated in the block on the first SIGTERM; further ones must not cut the clean end short."""

    def stop(*_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
