"""A lifeline: a process ends with the one that holds the other end, and so do its children."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from support.processes import PATIENCE_S, eventually, gone

_HOLD = """
import os, subprocess, sys, time
from harness.process.lifeline import die_with_parent
watched, events = map(int, sys.argv[1:])
die_with_parent(watched, events)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
os.write(events, f"{child.pid}\\n".encode())
if os.environ.get("LEAVE"):
    os._exit(0)
time.sleep(600)
"""


@pytest.fixture
def held(request: pytest.FixtureRequest) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A process that holds a lifeline; (process, the lifeline's other end, where it writes its child's pid)."""
    watched, line = os.pipe()
    events, out = os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(watched), str(out)], pass_fds=(watched, out), start_new_session=True,
        env={**os.environ, **getattr(request, "param", {})},
    )  # fmt: skip
    os.close(watched)
    os.close(out)
    yield process, line, events
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    os.close(events)


def test_a_lifeline_that_was_cut_before_it_was_held(held: tuple[subprocess.Popen[bytes], int, int]) -> None:
    process, line, _ = held
    os.close(line)  # Python has not even started there
    eventually(lambda: process.poll() is not None, "the process has ended")
    assert process.returncode == -signal.SIGKILL


def test_a_cut_lifeline_takes_the_children_along(held: tuple[subprocess.Popen[bytes], int, int]) -> None:
    process, line, events = held
    child = int(os.read(events, 100))
    assert not gone(child)
    assert process.poll() is None
    os.close(line)
    eventually(lambda: process.poll() is not None and gone(child), "both are gone")


@pytest.mark.parametrize("held", [{"LEAVE": "1"}], indirect=True)
def test_the_end_of_a_worker_is_seen_while_its_lifeline_stands(
    held: tuple[subprocess.Popen[bytes], int, int],
) -> None:
    process, line, events = held
    child = int(os.read(events, 100))
    # The watcher does not keep the pipe open.
    assert select.select([events], [], [], PATIENCE_S)[0]
    assert os.read(events, 1) == b""
    process.wait()
    os.close(line)
    eventually(lambda: gone(child), "the child of a worker that has ended is gone too")
