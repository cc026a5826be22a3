"""Signals that ask a run to end, and a terminal that goes away under it."""

from __future__ import annotations

import contextlib
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from harness.errors import Exit
from harness.process import signals
from support.processes import PATIENCE_S, eventually, gone
from support.sandbox import COMMAND, Sandbox

pytestmark = pytest.mark.e2e


@pytest.fixture
def heard() -> Iterator[None]:
    """Whoever runs the tests under nohup has SIGHUP ignored, and so have its children."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in signals.TERMINATION_SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("heard")
@pytest.mark.parametrize("asked", signals.TERMINATION_SIGNALS)
def test_a_signal_is_heard_only_while_a_run_goes_on(asked: signal.Signals) -> None:
    before = signal.getsignal(asked)
    with signals.handle_termination():
        with pytest.raises(signals.Terminated, match=asked.name):
            os.kill(os.getpid(), asked)
        for number in signals.TERMINATION_SIGNALS:
            os.kill(os.getpid(), number)  # nothing cuts the clean end short
    assert signal.getsignal(asked) is before


def test_a_second_ctrl_c_does_not_end_the_printing_of_results() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with signals.one_interrupt():
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.handle_termination():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.nightly
@pytest.mark.usefixtures("heard")
def test_a_lost_terminal_ends_a_run_cleanly(sandbox: Sandbox) -> None:
    suite = sandbox.suite("{implementation: missing}", "{implementation: hangs}")
    ours, theirs = pty.openpty()
    # In a session of its own whose terminal this is: closing our end is then what closing a window is.
    take = "import fcntl, os, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
    process = subprocess.Popen(
        [sys.executable, "-c", take, *COMMAND, "run", suite, "--out", "run"], cwd=sandbox.folder, env=sandbox.environment,
        stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    os.set_blocking(ours, False)

    def hanging() -> bool:
        with contextlib.suppress(OSError):
            os.read(ours, 65536)  # a full terminal would hold the run up
        return (sandbox.folder / "pids").exists()

    eventually(hanging, "the second Cell hangs")
    pids = sandbox.hanging()
    os.close(ours)
    assert process.wait(PATIENCE_S) == Exit.INFRASTRUCTURE
    run = sandbox.read()
    assert run.footer is not None
    assert (run.footer.how, len(run.records), len(run.footer.missing)) == ("interrupted", 1, 1)
    assert run.footer.missing[0] in (sandbox.run_folder / "report.html").read_text(encoding="utf-8")
    eventually(lambda: all(map(gone, pids)), "the worker and its child are gone")
