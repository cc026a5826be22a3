"""Child processes that talk into a file and never outlive the block that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def python(arguments: Sequence[str], talk: Path, environment: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start this Python with `arguments`; at the end of the block kill it and whatever it started.

    stdout and stderr go into the file `talk`; `environment` is added to this process's own.
    """
    with talk.open("wb") as out:
        # A session of its own, so that its children can be ended with it, and Ctrl-C is ours alone to handle.
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
    try:
        yield process
    finally:
        # All may be gone by now; of a group of zombies macOS says PermissionError.
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def said(talk: Path) -> str:
    """Return what a child wrote so far."""
    return talk.read_text(encoding="utf-8", errors="replace")


def met_full_disk(talk: str) -> bool:
    """Say whether a child's words tell of a full disk or quota."""
    return any(sign in talk for sign in ("No space left on device", "Disk quota exceeded", "os error 28"))
