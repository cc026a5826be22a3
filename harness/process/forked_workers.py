"""Workers that are forks of a process which has imported some modules: a worker then starts in milliseconds. Linux only.

A worker is a module that a new process would run by `python -m MODULE EVENTS LIFELINE TASK`, and a fork runs it in the same
way. The program that has tasks uses `WorkerServer`. The server is `python -m harness.process.forked_workers LIFELINE
IMPORT...`, with the socket of a `ForkServer` as its standard input.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import json
import os
import runpy
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import NoReturn

from harness.process.fork_server import Fork, ForkServer, serve
from harness.process.lifeline import die_with_parent
from harness.process.signals import TERMINATION_SIGNALS
from harness.process.supervisor import LastLines, module_arguments

_READY_S = 600.0
"""Largest duration of the imports, in seconds. They take seconds, unless the machine is very busy."""
_TOKEN_LENGTH = 32
_BUFFERED = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)
_START_S = 60.0
"""Largest duration of a fork, in seconds. It takes milliseconds, unless the machine is very busy."""


class ForkedWorker(Fork):
    """A worker that a server has forked. It has the attributes of a `Subprocess` that a WorkerPool needs."""

    def __init__(self, server: socket.socket, request: Mapping[str, str]) -> None:
        reading, writing = os.pipe()
        printed = os.fdopen(reading, "rb")
        with tempfile.TemporaryFile() as stdin, os.fdopen(writing, "wb") as output:
            stdin.write(json.dumps(request).encode())
            stdin.seek(0)
            super().__init__(server, stdin, output)
        self._lines = LastLines(printed)

    @property
    def output(self) -> str:
        """The last lines of the worker's stdout and stderr."""
        return self._lines.text

    def close(self) -> None:
        """Kill the whole process group, read the rest of the output, and close the pipes."""
        super().close()
        self.kill_group()
        self.pid = 0  # another process may get this id now
        self._lines.join()


class WorkerServer(ForkServer):
    """A server that forks workers. The constructor raises OSError if the server cannot be started.

    python: the interpreter. imports: modules that the server imports. environment: environment variables of the server.
    token_name: name of a further variable, whose value identifies a worker and the processes that it starts.
    """

    def __init__(self, python: str, imports: Sequence[str], environment: Mapping[str, str], token_name: str) -> None:
        self._token_name = token_name
        command = [python, *module_arguments(__name__)]
        super().__init__(command, imports, {**environment, token_name: " " * _TOKEN_LENGTH})
        self._is_ready = False

    def is_ready(self) -> bool:
        """Wait until the imports are done. Return False if they fail, or if forks are not safe."""
        self._is_ready = self._is_ready or self.wait_ready(_READY_S)
        return self._is_ready

    def start_worker(self, module: str, task: str, token: str) -> ForkedWorker:
        """Fork a worker, and return it. Raises OSError if the server has ended.

        token: text of 32 letters that no other worker has.
        """
        request = {"module": module, "task": task, "token_name": self._token_name, "token": token}
        worker = ForkedWorker(self._socket, request)
        self._forks.append(worker)
        if not worker.wait_started(_START_S):
            worker.close()
            raise ChildProcessError("the server of workers has ended")
        return worker


def _run(events: int, lifeline: int) -> NoReturn:
    """Run the worker that standard input names, as `python -m` does, and end this process."""
    _skip_inherited_exit_functions()
    request = json.load(sys.stdin)
    _mark(request["token_name"], request["token"])
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in TERMINATION_SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    sys.argv = [request["module"], str(events), str(lifeline), request["task"]]
    sys.modules.pop(request["module"], None)  # runpy warns of a module that is imported already
    runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    _end()


def _skip_inherited_exit_functions() -> None:
    """Make the end of this process skip the exit functions of C that the server registered.

    The libraries that the server imported destroy their objects in such functions, which takes a fifth of a second. C runs
    exit functions in reverse order. So the two that are registered here run after all later ones, and before the inherited
    ones, and the last of the two ends the process.
    """
    c = ctypes.CDLL(None)
    if not hasattr(c, "on_exit"):  # only glibc has it
        return
    null, end, write_out = ctypes.c_void_p(0), *(ctypes.cast(f, ctypes.c_void_p) for f in (c._exit, c.fflush))
    c.on_exit(end, null)  # _exit(code) ends the process
    c.__cxa_atexit(write_out, null, null)  # fflush(NULL) writes out all files, before that


def _end() -> NoReturn:
    """End this process as Python ends a program, except that no object is destroyed, which would take half a second.

    Threads are awaited. Functions run that Python has registered for the end of the process, and those that C libraries
    have registered since the fork. Open files are written out.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for one in gc.get_objects():  # those of the server are frozen, and so not in the list
        if type(one) in _BUFFERED:
            with contextlib.suppress(OSError, ValueError):  # a closed file, or a full disk
                one.flush()
    ctypes.CDLL(None).exit(0)
    raise AssertionError


def _mark(name: str, token: str) -> None:
    """Set an environment variable of this process so that other processes read its value in /proc/PID/environ.

    That file shows the memory that held the variables when the server started. So `token` is written to this memory. It
    identifies the processes that this worker starts.
    """
    getenv = ctypes.CDLL(None).getenv
    getenv.argtypes, getenv.restype = [ctypes.c_char_p], ctypes.c_void_p
    value = token.encode()
    ctypes.memmove(getenv(name.encode()), value, min(len(value), _TOKEN_LENGTH))
    os.environ[name] = token


def main(argv: list[str]) -> int:
    """Import the modules, then fork a worker for each request. Return 0 when the program ends the server."""
    for number in (signal.SIGINT, *TERMINATION_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(int(argv[1]), sys.stdin.fileno())
    for module in argv[2:]:
        import_module(module)
    gc.collect()
    gc.freeze()  # without this, a collection in a fork would copy each page that has an object
    with socket.socket(fileno=0) as connection:
        return serve(connection, _run, kills_groups=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
