"""Workers that are slow, and workers that hang: only the latter is a finding."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.process import fork_server, worker_pool
from harness.process.worker_pool import WorkerPool, _Clock
from support.processes import eventually, gone

linux = pytest.mark.skipif(sys.platform != "linux", reason="forks need Linux")

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


FORKED = """
import atexit, json, os, sys, time
from harness.process.event_pipe import event_writer
assert "slow_library" in sys.modules  # a fork has what the server imported
import slow_library
task = json.loads(sys.argv[3])
with event_writer(int(sys.argv[1]), int(sys.argv[2])) as emit:
    slow_library.calls += 1
    emit(pid=os.getpid(), parent=os.getppid(), calls=slow_library.calls, session=os.getsid(0), stdin=sys.stdin.read())
    atexit.register(lambda: open(task["end"], "w").close())
    if task["do"] == "fail":
        print("a last word")
        sys.exit(3)
    if task["do"] == "crash":
        os.kill(os.getpid(), 11)
    if task["do"] == "write":
        sys.modules["a file that stays open"] = open(task["end"] + " text", "w")
        sys.modules["a file that stays open"].write("a last word")
    if task["do"] == "close":
        sys.stdout.close()
    if task["do"] == "abort":  # in a destructor of a C++ library, for example
        import ctypes
        libc = ctypes.CDLL(None)
        libc.__cxa_atexit(libc.abort, None, None)
    if task["do"] == "leave" and not os.fork():  # a daemon: in a session of its own, without exec
        os.setsid()
        time.sleep(600)
"""

# At the end of the process, a function of C that is registered on import removes a file.
SLOW_LIBRARY = """
import ctypes
calls, path, libc = 0, ctypes.create_string_buffer({path!r}), ctypes.CDLL(None)
libc.__cxa_atexit(ctypes.cast(libc.unlink, ctypes.c_void_p), path, None)
"""


@pytest.fixture
def forking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerPool]:
    (tmp_path / "forked_worker.py").write_text(FORKED)
    (tmp_path / "kept").touch()
    (tmp_path / "slow_library.py").write_text(SLOW_LIBRARY.format(path=str(tmp_path / "kept").encode()))
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(worker_pool.__file__).parents[2]}")
    monkeypatch.delenv(fork_server.COLD_START, raising=False)
    with WorkerPool(imports=["slow_library"]) as pool:
        yield pool


def run_forked(pool: WorkerPool, tmp_path: Path, do: str = "") -> tuple[dict[str, Any], str]:
    """Return what a worker reported about itself, and why it failed."""
    task = {"do": do, "end": str(tmp_path / f"end {do}")}
    first, *rest = pool.events("forked_worker", task, 60.0)
    return first, rest[0]["died"] if rest else ""


@linux
def test_forks_of_one_process_are_like_new_processes(forking: WorkerPool, tmp_path: Path) -> None:
    one, other = (run_forked(forking, tmp_path)[0] for _ in range(2))
    assert one["parent"] == other["parent"] != os.getpid()
    assert one["pid"] == one["session"] != other["pid"]
    assert (one["calls"], other["calls"]) == (1, 1)
    assert one["stdin"] == ""
    assert (tmp_path / "end ").is_file()  # what was registered for the end of the process was called


@linux
def test_the_end_of_a_fork_is_described_like_that_of_a_process(
    forking: WorkerPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "exit code 3" in run_forked(forking, tmp_path, "fail")[1]
    assert capfd.readouterr().err == "| a last word\n"
    assert run_forked(forking, tmp_path, "crash")[1] == "the process died of SIGSEGV"
    assert run_forked(forking, tmp_path)[1] == ""  # the server lives on


@linux
def test_a_fork_ends_as_a_program_does(forking: WorkerPool, tmp_path: Path) -> None:
    assert run_forked(forking, tmp_path, "write")[1] == ""
    assert (tmp_path / "end write text").read_text() == "a last word"
    assert run_forked(forking, tmp_path, "close")[1] == ""
    assert run_forked(forking, tmp_path, "abort")[1] == "the process died of SIGABRT"


@linux
def test_a_fork_does_not_run_the_exit_functions_of_libraries_that_the_server_imported(
    forking: WorkerPool, tmp_path: Path
) -> None:
    assert run_forked(forking, tmp_path)[1] == ""
    assert (tmp_path / "kept").exists()


GUARDED = """
import sys
from harness.process.event_pipe import event_writer
if __name__ == "__main__":
    with event_writer(int(sys.argv[1]), int(sys.argv[2])):
        print("a last word")
        sys.exit(3)
"""


@linux
def test_a_worker_that_the_server_has_imported_prints_no_warning_of_python(
    forking: WorkerPool, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").touch()
    (tmp_path / "workers" / "guarded.py").write_text(GUARDED)
    with WorkerPool(imports=["workers.guarded"]) as pool:
        (died,) = pool.events("workers.guarded", {}, 60.0)
    assert "exit code 3" in died["died"]
    assert capfd.readouterr().err == "| a last word\n"


@linux
def test_a_process_that_a_fork_leaves_behind_is_found_and_killed(
    forking: WorkerPool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "_GRACE_S", 0.3)
    why = re.fullmatch(r"left a process behind: \S+ \((\d+)\); killed", run_forked(forking, tmp_path, "leave")[1])
    assert why
    eventually(lambda: gone(int(why[1])), "the process is killed")


@linux
def test_a_pool_whose_server_was_killed_goes_on_with_new_processes(forking: WorkerPool, tmp_path: Path) -> None:
    os.kill(run_forked(forking, tmp_path)[0]["parent"], signal.SIGKILL)
    first, *_ = forking.events("forked_worker", {"do": "", "end": str(tmp_path / "end")}, 60.0)
    assert "died" in first  # its assertion about the imports fails in a new process


@linux
def test_a_pool_ends_its_server(forking: WorkerPool, tmp_path: Path) -> None:
    parent = run_forked(forking, tmp_path)[0]["parent"]
    forking.__exit__()
    assert gone(parent)
