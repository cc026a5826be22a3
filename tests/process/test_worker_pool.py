"""Workers that are slow, and workers that hang: only the latter is a finding."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from harness.process import worker_pool
from harness.process.worker_pool import WorkerPool, _Clock

LATE = """
import os, sys, time
from harness.process.event_pipe import event_writer
with event_writer(int(sys.argv[1]), int(sys.argv[2])) as emit:
    emit(value=1)
time.sleep(600)
"""


def test_a_process_that_sleeps_uses_up_patience_and_one_that_waits_for_a_processor_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = iter([0.0, 5.0, 9.0])
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as child:
        try:
            monkeypatch.setattr(worker_pool.time, "monotonic", lambda: next(now))
            monkeypatch.setattr(_Clock, "_cpu_s", lambda _: 1.0)
            monkeypatch.setattr(_Clock, "_runs", lambda _: False)
            clock = _Clock(child.pid)
            clock.tick()
            assert clock.seconds == 5.0
            monkeypatch.setattr(_Clock, "_runs", lambda _: True)  # runnable, but without a processor
            clock.tick()
            assert clock.seconds == 5.0
        finally:
            child.kill()


def test_the_clock_reads_the_state_of_a_process() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as child:
        try:
            clock, deadline = _Clock(child.pid), time.monotonic() + 60
            while not clock.seconds and time.monotonic() < deadline:
                clock.tick()
            assert clock.seconds > 0
            psutil.Process(child.pid).suspend()
        finally:
            child.kill()


def test_a_worker_that_has_reported_everything_and_ends_late_is_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "late_worker.py").write_text(LATE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(worker_pool.__file__).parents[2]}")
    monkeypatch.setattr(worker_pool, "_GRACE_S", 0.2)
    assert list(WorkerPool().events("late_worker", {}, 60.0)) == [{"value": 1}]
    assert "note: a process did not end" in capfd.readouterr().err


NOISY = """
import os, sys
from harness.process.event_pipe import event_writer
with event_writer(int(sys.argv[1]), int(sys.argv[2])) as emit:
    print("a library says \\x1b[2J", flush=True)
    os.write(2, "raw \u202e\\n".encode())
    emit(value=1)
    if "fail" in sys.argv[3]:
        sys.exit(3)
"""


@pytest.mark.parametrize("fails", [False, True])
def test_the_output_of_a_worker_is_shown_only_if_it_fails(
    fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "noisy_worker.py").write_text(NOISY, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(worker_pool.__file__).parents[2]}")
    events = list(WorkerPool().events("noisy_worker", {"do": "fail"} if fails else {}, 60.0))
    printed = capfd.readouterr()
    assert printed.out == ""
    if fails:
        assert "exit code 3" in events[-1]["died"]
        assert printed.err == "| a library says \\x1b[2J\n| raw \\u202e\n"
    else:
        assert (events, printed.err) == ([{"value": 1}], "")
