"""Fork server: a process that imports libraries once, and forks a process for each task. Linux only.

The program that has tasks uses `ForkServer`, and the server runs `serve`. The server has no threads of Python and runs
no task itself. So a fork starts in the state of a new process after the same imports. A fork has a session of its own,
and is killed when its server or the program ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import IO

from harness.process import resident_pages
from harness.process.supervisor import Pipe, Subprocess

COLD_START = "PEFT_HARNESS_COLD_START"
"""Environment variable. If it is 1, every worker is a new process."""
_READY = b"ready"
_REQUEST = b"fork"
_DESCRIPTORS = 5
_PARENT_DEATH_SIGNAL = 1
"""Option PR_SET_PDEATHSIG of prctl: the kernel sends this process a signal when its parent ends."""
_STDERR = 2
_END_S = 10.0
"""Seconds to wait until the server has reported the end of a fork that was killed."""


def is_allowed() -> bool:
    """Return whether workers of this command may be forks: on Linux, if `COLD_START` is not 1."""
    return sys.platform == "linux" and os.environ.get(COLD_START) != "1"


class ForkServer:
    """A running fork server.

    command: command that starts a process, which must call `serve` with its standard input. The constructor appends the
    number of a lifeline (see `harness.process.lifeline`) and `arguments` to `command`. It raises OSError if the process
    cannot be started.
    """

    def __init__(self, command: Sequence[str], arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._forks: list[Fork] = []
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = Subprocess(
                command, arguments, environment=environment, lifeline=True, stdin=theirs.fileno(), stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )  # fmt: skip

    @property
    def is_alive(self) -> bool:
        """True until the server ends."""
        return self._process.exit_code is None

    @property
    def is_idle(self) -> bool:
        """True if no fork of this server runs."""
        self._forks = [fork for fork in self._forks if fork.exit_code is None]
        return not self._forks

    def wait_ready(self, timeout: float) -> bool:
        """Wait until the imports are done. Return False if they fail or take longer than `timeout` seconds.

        Also return False if the server cannot fork safely, e.g. because an import started a thread.
        """
        return bool(select.select([self._socket], [], [], timeout)[0]) and self._socket.recv(len(_READY)) == _READY

    def start(self, stdin: IO[bytes], output: IO[bytes]) -> Fork:
        """Ask the server to fork a process, and return this process.

        stdin: file for its standard input. output: file for its stdout and stderr. Raises OSError if the server has
        ended.
        """
        fork = Fork(self._socket, stdin, output)
        self._forks.append(fork)
        return fork

    def kill(self) -> None:
        """Kill the server, and so its forks. The call is safe while another thread waits for the server."""
        self._process.kill_group()

    def close(self) -> None:
        """End the server and its forks."""
        self._socket.close()
        self._process.close()


class Fork:
    """A process that a fork server has forked, or soon will. It has the attributes of a `Subprocess` that workers need."""

    def __init__(self, server: socket.socket, stdin: IO[bytes], output: IO[bytes]) -> None:
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            pipes = [os.pipe() for _ in range(3)]
            (events, events_end), (status, status_end), (lifeline_end, lifeline) = pipes
            for descriptor in (events, status, lifeline):
                ours.callback(os.close, descriptor)
            for descriptor in (events_end, status_end, lifeline_end):
                theirs.callback(os.close, descriptor)
            passed = [stdin.fileno(), output.fileno(), events_end, lifeline_end, status_end]
            socket.send_fds(server, [_REQUEST], passed)
            self._ours = ours.pop_all()
        self.events = Pipe(events)
        self._status = Pipe(status)
        self.pid = 0
        """The process id; 0 until the server has forked."""
        self._code: int | None = None

    @property
    def exit_code(self) -> int | None:
        """The exit code. Negative if a signal ended the process; None while the process runs."""
        while self._code is None and self._status.readable():
            self._read_status()
        return self._code

    def wait_started(self, timeout: float) -> bool:
        """Wait until the server has forked, so that `pid` is known. Return False after `timeout` seconds."""
        while not self.pid and self._code is None and self._status.readable(timeout):
            self._read_status()
        return bool(self.pid)

    def _read_status(self) -> None:
        for line in self._status.lines():
            name, number = line.decode().split()
            if name == "pid":
                self.pid = int(number)
            else:
                self._code = int(number)
        if self._status.is_closed and self._code is None:
            self._code = -signal.SIGKILL  # the server has ended, so the kernel has killed its forks

    @property
    def is_over(self) -> bool:
        """True if all events have been read: the pipe is closed, or the process has ended and the pipe is empty."""
        return self.events.is_closed or (self.exit_code is not None and not self.events.readable())

    def wait(self, timeout: float) -> int | None:
        """Return the exit code. If the process still runs after `timeout` seconds, return None."""
        while self._code is None and self._status.readable(timeout):
            self._read_status()
        return self._code

    def kill_group(self) -> None:
        """Kill the process group: the process and its children, even if the process itself has ended."""
        pid = self.pid  # read once: another thread may close this fork now, and group 0 is that of this process
        if pid:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)

    def close(self) -> None:
        """Kill the whole process group, and close the pipes. A second call does nothing."""
        if self.exit_code is None and self.pid:
            self.kill_group()
            self.wait(_END_S)
        if self._code is None:
            self._code = -signal.SIGKILL
        self._ours.close()  # a fork that has not started yet ends when it finds its lifeline cut


def serve(connection: socket.socket, run: Callable[[int, int], int], *, kills_groups: bool = True) -> int:
    """Fork a process for each request, until the other end of `connection` closes. Return an exit code.

    The code is 1 if forks are not safe: another thread runs, or the kernel cannot bring pages of files into memory.
    Otherwise it is 0. If the system refuses a fork, the program that requested it finds that the fork has ended without
    a process id. After each request, the server forks one process in advance, because a fork that loads the libraries'
    pages takes 30 ms. If the system refuses, it forks at the next request.

    run: function that a fork calls with the descriptors of its events and of its lifeline; it returns the exit code.
    kills_groups: whether to kill the processes that a fork leaves behind. If false, the requesting program kills them.
    """
    if threading.active_count() > 1:
        return 1  # a thread that an import started would be missing in the forks
    try:
        pages = resident_pages.resident()
        resident_pages.populate(pages)
    except OSError:
        return 1  # the memory of the forks could not be measured
    status_of: dict[int, int] = {}
    ended, tell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(tell)
    signal.signal(signal.SIGCHLD, lambda *_: None)  # Python writes to `tell` only for signals with a handler
    asked = connection.fileno()

    def fork(*of_request: int) -> WaitingFork | None:
        return _fork(run, pages, (ended, tell, asked, *status_of.values(), *of_request))

    waiting = fork()
    connection.send(_READY)
    while True:
        readable, _, _ = select.select([asked, ended], [], [])
        if ended in readable:
            os.read(ended, 1 << 16)
            _report_ends(status_of, kills_groups)
        if asked in readable:
            request, descriptors, _, _ = socket.recv_fds(connection, len(_REQUEST), _DESCRIPTORS)
            if not request:
                return 0
            *passed, status = descriptors
            if not (waiting and waiting.begin(passed)):  # it may have been killed
                waiting = fork(*descriptors)
                waiting = waiting if waiting and waiting.begin(passed) else None
            if waiting is None:
                os.close(status)  # no process or no memory is left: the other forks go on
            else:
                status_of[waiting.pid] = status
                _tell(status, f"pid {waiting.pid}\n")
            for descriptor in passed:
                os.close(descriptor)
            waiting = fork()


class WaitingFork:
    """A fork that waits for its request."""

    def __init__(self, pid: int, channel: socket.socket) -> None:
        self.pid, self._channel = pid, channel

    def begin(self, descriptors: Sequence[int]) -> bool:
        """Send the request's descriptors to the fork. Return False if this fails, e.g. because the fork has ended."""
        with self._channel:
            try:
                socket.send_fds(self._channel, [_REQUEST], descriptors)
            except OSError:
                os.kill(self.pid, signal.SIGKILL)  # the system may have refused to send, and the fork may live
                os.waitpid(self.pid, 0)
                return False
        return True


def _fork(
    run: Callable[[int, int], int], pages: Sequence[resident_pages.Range], of_server: Sequence[int]
) -> WaitingFork | None:
    """Fork a process that waits for its request, and return it. Return None if the system refuses.

    of_server: descriptors that the fork closes.
    """
    server = os.getpid()
    try:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError:  # no descriptor is left
        return None
    with contextlib.ExitStack() as ends, warnings.catch_warnings():
        ends.enter_context(theirs)
        # Python warns of threads, but those of OpenBLAS and jemalloc, the only ones here, survive a fork.
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            return None
        if pid:
            return WaitingFork(pid, ours)
        ends.pop_all()
    ours.close()
    signal.set_wakeup_fd(-1)
    for descriptor in of_server:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    while (nothing := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass  # a received descriptor must not take the number of a standard stream
    os.close(nothing)
    _detach(server)
    resident_pages.populate(pages)
    with theirs:
        request, descriptors, _, _ = socket.recv_fds(theirs, len(_REQUEST), _DESCRIPTORS)
    if not request:
        os._exit(0)  # the server has ended
    resident_pages.populate(pages)  # again: the kernel may have taken pages back during a long wait
    stdin, output, events, lifeline = descriptors
    for descriptor, stream in ((stdin, 0), (output, 1), (output, 2)):
        os.dup2(descriptor, stream)
    for descriptor in (stdin, output):
        os.close(descriptor)
    sys.stdout.flush()
    code = run(events, lifeline)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _detach(parent: int) -> None:
    """Give this fork its own session. The kernel kills it when its parent ends."""
    os.setsid()
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # the parent ended before the call above
        os._exit(1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)


def _report_ends(status_of: dict[int, int], kills_groups: bool) -> None:
    """Report the exit code of each fork that has ended. If `kills_groups`, kill the rest of its process group.

    status_of: process id of a running fork -> descriptor to which its exit code is written.
    """
    for pid in list(status_of):
        # WNOWAIT keeps it a zombie, so that no other process gets its id, which is also the id of the group.
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            continue
        if kills_groups:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        status = status_of.pop(pid)
        _tell(status, f"exit {os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        os.close(status)


def _tell(status: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the program that asked for the fork no longer listens
        os.write(status, line.encode())
