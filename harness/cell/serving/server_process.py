"""Run the process of a model server: find its interpreter, start it, watch it and end it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from harness.conformance.served.client import Client
from harness.errors import ServerError, UsageError
from harness.methods.servers.kind import Launch, ServerKind
from harness.process import lifeline
from harness.process.supervisor import Subprocess, signal_name

_POLL_S, _ANSWER_S = 0.2, 2.0
"""In seconds, while a server starts: the pause between two requests, and the time to wait for each answer."""
_GRACE_S = 5.0
"""Seconds to wait after SIGTERM before a server is killed. It can remove its files in this time."""
_END_S = 2.0
"""Seconds to wait for the end of a server that no longer answers."""
_PATIENCE_S = 60.0
_REASON = re.compile(r"\b\w+(?:Error|Exception|Exit)\b: \S.*")
_FACTS = """
import importlib.util, json, sys
from importlib.metadata import PackageNotFoundError, version
found = {}
for name in sys.argv[2:]:
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps([importlib.util.find_spec(sys.argv[1]) is not None, found]))
"""


@dataclass(frozen=True)
class ServerPython:
    """A Python interpreter that can run a model server."""

    path: str
    """Path of the interpreter."""
    software: dict[str, str]
    """Name of each distribution in `ServerKind.distributions` that is installed for this interpreter -> its version."""


def find_python(kind: ServerKind, own: str) -> ServerPython | str:
    """Return an interpreter that can run the server, or the reason why there is none.

    own: interpreter of the server's own environment. If it is empty, the interpreter of this process is tried.
    """
    python = own or sys.executable
    command = [python, "-P", "-c", _FACTS, kind.module, *kind.distributions]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_PATIENCE_S, env=_environment(own)
        )
        is_there, software = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        return f"not run: {python} does not start ({type(error).__name__})"
    if is_there:
        return ServerPython(python, software)
    way = f"`peft-harness env create {kind.environment}`" if kind.environment else f"install {kind.module}"
    return f"not run: {kind.name} is not installed; {way}"


def free_port() -> int:
    """Return a port of 127.0.0.1 that no process listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class RunningServer:
    """A model server that has started and answers requests."""

    def __init__(self, process: Subprocess, client: Client, start_s: float) -> None:
        self._process, self.client, self.start_s = process, client, start_s

    def ended(self) -> str:
        """Return how the process ended, as text. If it still runs after `_END_S` seconds, return an empty string."""
        self._process.wait(_END_S)
        return _ended(self._process)

    def memory_B(self) -> int:  # noqa: N802  # a unit
        """Return the resident memory of all processes of the server, in bytes."""
        found = 0
        for one in self._processes():
            with contextlib.suppress(psutil.Error):
                found += one.memory_info().rss
        return found

    def cpu_s(self) -> float:
        """Return the CPU seconds of all processes of the server so far."""
        found = 0.0
        for one in self._processes():
            with contextlib.suppress(psutil.Error):
                times = one.cpu_times()
                found += times.user + times.system
        return found

    def _processes(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            first = psutil.Process(self._process.pid)
            return [first, *first.children(recursive=True)]
        return []


@contextmanager
def running(kind: ServerKind, python: ServerPython, own: str, launch: Launch) -> Iterator[RunningServer]:
    """Start a server, wait until it answers, and yield it. At the end, the server and all its children are killed.

    The server also dies if this process dies in any way. The server writes to the stdout of this process. own: as in
    `find_python`. Raises ServerError if the server ends or does not answer in time.
    """
    command = [python.path, *kind.arguments(launch)]
    environment = {**_environment(own), **kind.variables}
    begun = time.monotonic()
    with Subprocess(
        [sys.executable, "-P", lifeline.__file__], command, environment=environment, lifeline=True,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        url = f"http://127.0.0.1:{launch.port}"
        try:
            _wait(process, Client(url, patience=_ANSWER_S), kind, launch.name, begun)
            yield RunningServer(process, Client(url, patience=kind.patience_s), time.monotonic() - begun)
        finally:
            process.terminate(_GRACE_S)


def _wait(process: Subprocess, client: Client, kind: ServerKind, name: str, begun: float) -> None:
    """Wait until the server lists the base model under the name `name`.

    Raises ServerError if the process ends, if it does not answer in time, or if another server answers on the port.
    """
    while True:
        if ended := _ended(process):
            raise ServerError(f"{kind.name} {ended} before it answered", hint="the log of the Cell has its output")
        listed = _listed(client)
        if name in listed:
            return
        if listed:
            what = f"another server answers on port {client.url.rpartition(':')[2]}; it has {', '.join(listed)}"
            raise ServerError(what, where=client.url, hint="run the Cell again, which takes another port")
        if time.monotonic() - begun > kind.start_s:
            what = f"{kind.name} did not answer within {kind.start_s:g} s of its start"
            raise ServerError(what, hint="the log of the Cell has its output")
        time.sleep(_POLL_S)


def _listed(client: Client) -> list[str]:
    """Return the names of the models that the server lists. The list is empty if the server is not ready."""
    try:
        return [one.name for one in client.models()]
    except (ServerError, UsageError):
        return []


def _ended(process: Subprocess) -> str:
    code = process.exit_code
    if code is None:
        return ""
    return f"was killed by {name}" if (name := signal_name(code)) else f"ended with exit code {code}"


def _environment(own: str) -> dict[str, str]:
    """Return the environment variables for a server: those of this process, without PYTHONPATH if `own` is not empty.

    own: interpreter of the server's own environment, or an empty string.
    """
    return {key: value for key, value in os.environ.items() if not (own and key == "PYTHONPATH")}


def reason(log: Path, start: int) -> str:
    """Return the first line of a log that names an exception. If there is none, return the last line.

    The first exception is chosen because later ones are often its consequences. start: number of bytes at the beginning
    of the log to ignore. The result is empty if no line is left.
    """
    with contextlib.suppress(OSError), log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode("utf-8", "replace").strip().splitlines()
        found = next((one[0] for line in lines if (one := _REASON.search(line))), lines[-1] if lines else "")
        return " ".join(found.split())
    return ""
