"""Run the harness's own modules in forks of this process, which has imported torch already.

The import of torch, transformers and lm-eval takes longer than a small Cell. A library that reads environment variables on
import has those of this process, not those of the fork. So forks are only for tests of the work inside a process.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any, NoReturn

import pytest

import harness
from harness.process import fork_server, supervisor

PACKAGE = Path(harness.__file__).parent
_IMPORTED = (
    "harness.cell.lifecycle", "harness.memory_model.cell_prediction", "lm_eval.evaluator",
    "transformers.models.bert.modeling_bert", "transformers.models.llama.modeling_llama", "transformers.modeling_utils",
)  # fmt: skip
"""Modules that each fork would otherwise import anew."""


class ForkedModule:
    """Replacement for `subprocess.Popen` in `supervisor.Subprocess`. Runs `-m MODULE ARGUMENT ...` or a script in a fork."""

    def __init__(
        self, command: Sequence[str], *, env: Mapping[str, str] | None, stdin: int | IO[bytes],
        stdout: int | IO[bytes] | None, stderr: int | IO[bytes] | None, pass_fds: Collection[int], start_new_session: bool,
    ) -> None:  # fmt: skip
        assert start_new_session
        _python, safe, *argv = command
        assert safe == "-P"
        self.stdout: IO[bytes] | None = None
        self.stderr: IO[bytes] | None = None
        with contextlib.ExitStack() as ours:
            if stdin == subprocess.DEVNULL:
                stdin = ours.enter_context(open(os.devnull, "rb"))  # noqa: PTH123
            if stdout == subprocess.PIPE:
                reading, writing = os.pipe()
                self.stdout, stdout = open(reading, "rb"), ours.enter_context(open(writing, "wb"))  # noqa: PTH123, SIM115
            assert stderr in (None, subprocess.STDOUT)
            outputs = [stdout, stdout if stderr == subprocess.STDOUT else None]
            streams = [_descriptor(stream) for stream in (stdin, *outputs)]
            self.pid = os.fork()
            if not self.pid:
                _become(argv, os.environ if env is None else env, streams, pass_fds)
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = math.inf if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a fork", timeout or 0)
            time.sleep(0.005)
        return code

    def terminate(self) -> None:
        os.kill(self.pid, signal.SIGTERM)


def _descriptor(stream: int | IO[bytes] | None) -> int | None:
    return stream.fileno() if hasattr(stream, "fileno") else stream  # type: ignore[union-attr, return-value]


def _become(
    argv: list[str], environment: Mapping[str, str], streams: Sequence[int | None], kept: Collection[int]
) -> NoReturn:
    """Turn this fork into the process of a module: set its session, streams and environment, run the module, and exit.

    All other open files are closed.
    """
    code = 1
    try:
        os.setsid()
        for target, descriptor in enumerate(streams):
            if descriptor is not None:
                os.dup2(descriptor, target)
        for descriptor in map(int, os.listdir("/dev/fd")):  # noqa: PTH208
            if descriptor > 2 and descriptor not in kept:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
        sys.stdin, sys.stdout, sys.stderr = (open(n, mode) for n, mode in enumerate("rww"))  # noqa: PTH123, SIM115
        variables = dict(environment)
        os.environ.clear()
        os.environ.update(variables)
        gc.freeze()  # objects of earlier imports are not its own
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # a fork has no threads of its parent's pool
        is_module = argv[0] == "-m"
        sys.argv = argv[is_module:]
        run = runpy.run_module if is_module else runpy.run_path
        code = _exit_code(lambda: run(sys.argv[0], run_name="__main__"))
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _exit_code(run: Callable[[], object]) -> int:
    try:
        run()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  # of a process that ends with it
        traceback.print_exc()
        return 1
    return 0


def _popen(command: Sequence[str], **how: Any) -> Any:
    """Start a program: a module or script of the harness in a fork, any other as usual."""
    ours = command[1:3] == ["-P", "-m"] and command[3].startswith("harness.")
    ours |= command[1] == "-P" and Path(command[2]).is_relative_to(PACKAGE)
    return ForkedModule(command, **how) if ours else subprocess.Popen(command, **how)


def use(patch: pytest.MonkeyPatch) -> None:
    """Make `supervisor` fork this process where it would start a new Python. No fork server is started.

    A fork server would import it all again.
    """
    patch.setenv(fork_server.COLD_START, "1")
    for module in _IMPORTED:
        importlib.import_module(module)
    patch.setattr(supervisor, "subprocess", SimpleNamespace(**{**vars(subprocess), "Popen": _popen}))
