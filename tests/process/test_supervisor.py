"""Subprocesses: their events, output and exit codes, and that nothing of them is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from harness.process.supervisor import Subprocess, python, run_in_fork, signal_name
from support.processes import PATIENCE_S, eventually, gone

PYTHON = (sys.executable, "-S", "-c")


def test_events_are_read_to_the_end_also_of_a_process_that_has_died() -> None:
    code = "import os, sys; os.write(int(sys.argv[1]), b'one\\ntwo\\nto'); os.kill(os.getpid(), 9)"
    with Subprocess([*PYTHON, code], events=True) as child:
        lines = []
        while not child.is_over:
            if child.events.readable(1.0):
                lines += child.events.lines()
    assert lines == [b"one", b"two"]
    assert signal_name(child.exit_code or 0) == "SIGKILL"


def test_the_end_of_a_block_kills_the_whole_group() -> None:
    code = "import subprocess, sys, time; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    with Subprocess([*PYTHON, code], stdout=subprocess.PIPE) as child:
        assert child.wait(0.01) is None
        while not child.output:
            time.sleep(0.01)
    assert child.exit_code == -signal.SIGKILL
    eventually(lambda: gone(int(child.output)), "the grandchild is gone")


def test_a_closed_process_is_not_killed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with Subprocess([*PYTHON, ""]) as child:
        pass
    monkeypatch.setattr(os, "killpg", lambda *_: pytest.fail("the id may belong to another group"))
    child.close()
    child.kill_group()


def test_a_process_that_is_asked_to_end_may_end_cleanly() -> None:
    code = "import signal, sys, time\nsignal.signal(15, lambda *_: sys.exit(3))\nprint('ready', flush=True)\n"
    code += "while True: time.sleep(0.05)"  # Python handles a signal that came just before a sleep only after it
    with Subprocess([*PYTHON, code], stdout=subprocess.PIPE) as child:
        while not child.output:
            time.sleep(0.01)
        child.terminate(PATIENCE_S)
        assert child.exit_code == 3


def test_output_is_captured_and_searched_for_a_full_disk() -> None:
    with python(["-S", "-c", "import sys; print('a'); sys.exit('No space left on device')"], {}) as child:
        assert child.wait() == 1
    assert child.output == "a\nNo space left on device\n"
    assert child.reports_full_disk


def test_a_command_that_is_not_there_leaves_no_descriptor_open() -> None:
    before = psutil.Process().num_fds()
    with pytest.raises(FileNotFoundError):
        Subprocess(["/nowhere/at/all"], events=True, lifeline=True)
    assert psutil.Process().num_fds() == before


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_answers_dies_or_is_late() -> None:
    assert run_in_fork(lambda: b"x" * 200_000, 60.0) == b"x" * 200_000
    assert run_in_fork(lambda: os.kill(os.getpid(), signal.SIGKILL) or b"", 60.0) == b""
    assert run_in_fork(lambda: time.sleep(600) or b"", 0.05) is None


@pytest.mark.parametrize(("code", "name"), [(0, ""), (1, ""), (-9, "SIGKILL"), (-63, "signal 63")])
def test_names_of_signals(code: int, name: str) -> None:
    assert signal_name(code) == name
