"""The fork server: each fork is like a new process, and none outlives its server or its program."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from harness.process.fork_server import Fork, ForkServer
from support.processes import PATIENCE_S, eventually, gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the fork server needs Linux")

# Each task is Python code, which the fork reads from its standard input.
SERVER = """
import json, os, socket, sys, time
from harness.process import resident_pages
from harness.process.fork_server import serve
from harness.process.lifeline import die_with_parent
die_with_parent(int(sys.argv[1]), 0)
seen = []
{more}
pages = resident_pages.resident()
def run(events, lifeline):
    die_with_parent(lifeline, events)
    names = {{**globals(), "events": events}}
    exec(sys.stdin.read(), names)
    return names.get("code", 0)
sys.exit(serve(socket.socket(fileno=0), run))
"""


def started(more: str = "") -> ForkServer:
    return ForkServer([sys.executable, "-c", SERVER.format(more=more)], [], dict(os.environ))


@pytest.fixture
def server() -> Iterator[ForkServer]:
    one = started()
    assert one.wait_ready(PATIENCE_S)
    yield one
    one.close()


def start(server: ForkServer, task: str, output: Path) -> Fork:
    with tempfile.TemporaryFile() as stdin, output.open("wb") as file:
        stdin.write(task.encode())
        stdin.seek(0)
        return server.start(stdin, file)


def events(fork: Fork) -> list[bytes]:
    found = []
    while not fork.is_over:
        if fork.events.readable(1.0):
            found += fork.events.lines()
    return found


def test_a_fork_has_its_own_streams_session_and_state(server: ForkServer, tmp_path: Path) -> None:
    task = """
seen.append(1)
os.write(events, f"{os.getsid(0)} {os.getpid()}\\n".encode())
print(seen)
code = 3
"""
    forks = [start(server, task, tmp_path / who) for who in ("one", "two")]
    for fork, who in zip(forks, ("one", "two"), strict=True):
        assert fork.wait(PATIENCE_S) == 3
        assert events(fork) == [f"{fork.pid} {fork.pid}".encode()]
        fork.close()
        assert (tmp_path / who).read_text() == "[1]\n"
    assert server.is_idle


def test_the_pages_of_libraries_are_in_memory_from_the_start(server: ForkServer, tmp_path: Path) -> None:
    """Otherwise a Cell's peak would include the libraries' code that it uses first."""
    task = """
import mmap
here = {a for start, length in resident_pages.resident() for a in range(start, start + length, mmap.PAGESIZE)}
print(sum(a not in here for start, length in pages for a in range(start, start + length, mmap.PAGESIZE)), len(pages))
"""
    fork = start(server, task, tmp_path / "out")
    assert fork.wait(PATIENCE_S) == 0
    missing, ranges = map(int, (tmp_path / "out").read_text().split())
    assert missing == 0
    assert ranges > 0


def test_closing_a_fork_kills_its_children_too(server: ForkServer, tmp_path: Path) -> None:
    task = "import subprocess; print(subprocess.Popen(['sleep', '600']).pid, flush=True); time.sleep(600)"
    fork = start(server, task, tmp_path / "out")
    eventually(lambda: (tmp_path / "out").read_text().endswith("\n"), "the child is there")
    assert fork.exit_code is None
    assert not server.is_idle
    fork.close()
    assert fork.exit_code == -signal.SIGKILL
    eventually(lambda: gone(int((tmp_path / "out").read_text())), "the grandchild is gone")
    assert server.is_alive


def test_what_a_fork_leaves_behind_is_killed_when_it_ends(server: ForkServer, tmp_path: Path) -> None:
    fork = start(server, "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)", tmp_path / "out")
    assert fork.wait(PATIENCE_S) == 0
    eventually(lambda: gone(int((tmp_path / "out").read_text())), "the grandchild is gone")


def test_a_killed_server_takes_its_forks_along_and_says_so(server: ForkServer, tmp_path: Path) -> None:
    fork = start(server, "time.sleep(600)", tmp_path / "out")
    eventually(lambda: fork.exit_code is None and fork.pid > 0, "it was forked")
    psutil.Process(fork.pid).parent().kill()
    assert fork.wait(PATIENCE_S) == -signal.SIGKILL
    eventually(lambda: gone(fork.pid), "the fork is gone")
    eventually(lambda: not server.is_alive, "the server is gone")
    with pytest.raises(ConnectionError):
        start(server, "", tmp_path / "out")


def test_a_killed_program_takes_its_server_and_the_forks_along() -> None:
    code = f"""
import json, os, sys, tempfile, time
from harness.process.fork_server import ForkServer
server = ForkServer([sys.executable, "-c", {SERVER.format(more="")!r}], [], dict(os.environ))
assert server.wait_ready({PATIENCE_S})
stdin = tempfile.TemporaryFile(); stdin.write(b"time.sleep(600)"); stdin.seek(0)
fork = server.start(stdin, tempfile.TemporaryFile())
while fork.exit_code is None and not fork.pid: time.sleep(0.01)
import psutil
print(json.dumps([fork.pid, psutil.Process(fork.pid).ppid()]), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        pids = json.loads(program.stdout.readline())
        program.kill()
    for pid in pids:
        eventually(lambda pid=pid: gone(pid), "it is gone")


def test_a_fork_that_the_system_refuses_ends_no_other_fork(tmp_path: Path) -> None:
    more = """
# The first request gets the fork that waits. The next fork in advance and the fork of the second request are refused.
allowed = iter([True, False, False] + 9 * [True])
def fork(given=os.fork):
    if os.getpid() == own and not next(allowed):
        raise BlockingIOError("no process is left")
    return given()
own, os.fork = os.getpid(), fork
"""
    server = started(more)
    assert server.wait_ready(PATIENCE_S)
    one = start(server, "time.sleep(600)", tmp_path / "one")
    refused = start(server, "", tmp_path / "refused")
    assert (refused.wait(PATIENCE_S), refused.pid) == (-signal.SIGKILL, 0)
    last = start(server, "", tmp_path / "last")
    assert last.wait(PATIENCE_S) == 0
    assert one.exit_code is None
    for fork in (one, refused, last):
        fork.close()
    server.close()


def test_a_killed_fork_that_waits_for_its_request_is_replaced(server: ForkServer, tmp_path: Path) -> None:
    def waiting() -> list[psutil.Process]:
        return [one for one in psutil.Process(server._process.pid).children() if one.name() != "sh"]

    [first] = waiting()
    first.kill()
    eventually(lambda: first.status() == psutil.STATUS_ZOMBIE, "it has ended")
    fork = start(server, "print('begun')", tmp_path / "out")
    assert fork.wait(PATIENCE_S) == 0
    fork.close()
    assert (tmp_path / "out").read_text() == "begun\n"
    eventually(lambda: all(one.status() != psutil.STATUS_ZOMBIE for one in waiting()), "no zombie is left")


def test_a_killed_server_is_noticed_if_its_waiting_fork_was_replaced(server: ForkServer, tmp_path: Path) -> None:
    program = psutil.Process(server._process.pid)
    [first] = [one for one in program.children() if one.name() != "sh"]
    first.kill()
    eventually(lambda: first.status() == psutil.STATUS_ZOMBIE, "it has ended")
    fork = start(server, "time.sleep(600)", tmp_path / "out")
    eventually(lambda: fork.exit_code is None and fork.pid > 0, "it was forked")
    program.kill()
    assert fork.wait(PATIENCE_S) == -signal.SIGKILL


def test_no_descriptor_for_the_next_fork_ends_no_fork(tmp_path: Path) -> None:
    more = """
pairs = 0
def pair(*how, given=socket.socketpair):
    global pairs
    pairs += 1
    if pairs == 2:
        raise OSError("no descriptor is left")
    return given(*how)
socket.socketpair = pair
"""
    server = started(more)
    assert server.wait_ready(PATIENCE_S)
    one = start(server, "time.sleep(600)", tmp_path / "one")
    two = start(server, "", tmp_path / "two")
    assert two.wait(PATIENCE_S) == 0
    assert one.exit_code is None
    for fork in (one, two):
        fork.close()
    server.close()


def test_no_other_group_is_killed_if_a_fork_is_closed_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C kills all workers in one thread, while another thread closes one of them, which then has no id."""

    class ClosedMeanwhile(Fork):
        def __init__(self) -> None:
            self.ids = iter([2**22 + 1, 0])

        @property
        def pid(self) -> int:  # type: ignore[override]
            return next(self.ids)

    killed: list[int] = []
    monkeypatch.setattr(os, "killpg", lambda group, _: killed.append(group))
    ClosedMeanwhile().kill_group()
    assert killed == [2**22 + 1]


@pytest.mark.parametrize(
    "more",
    [
        "import threading; threading.Thread(target=time.sleep, args=(600,), daemon=True).start()",
        "raise OSError",
        "os._exit(0)",
    ],
)
def test_a_server_that_cannot_fork_safely_is_not_used(more: str) -> None:
    server = started(more)
    assert not server.wait_ready(PATIENCE_S)
    eventually(lambda: not server.is_alive, "it ends")
    server.close()


def test_a_fork_that_never_started_may_be_closed_twice_and_is_not_waited_for(
    server: ForkServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.kill(server._process.pid, signal.SIGSTOP)
    fork = start(server, "", tmp_path / "out")
    waits: list[float] = []
    monkeypatch.setattr(Fork, "wait", lambda _, timeout: waits.append(timeout))
    fork.close()
    fork.close()
    assert waits == []
    assert fork.exit_code == -signal.SIGKILL
    assert server.is_idle


def test_a_server_whose_imports_hang_is_not_waited_for() -> None:
    server = started("time.sleep(600)")
    assert not server.wait_ready(0.05)
    server.close()
    assert not server.is_alive


def test_descriptors_do_not_pile_up(server: ForkServer, tmp_path: Path) -> None:
    def descriptors() -> list[int]:
        theirs = psutil.Process(server._process.pid).num_fds()
        return [psutil.Process().num_fds(), theirs]

    before = descriptors()
    for _ in range(20):
        fork = start(server, "", tmp_path / "out")
        assert fork.wait(PATIENCE_S) == 0
        fork.close()
    eventually(lambda: descriptors() == before, "all are closed")
