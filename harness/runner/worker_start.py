"""Start the workers of Cells: as forks of a process that has imported the libraries, or as new processes."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

from harness.cell.job import Job
from harness.errors import StoreError
from harness.process import fork_server
from harness.process.fork_server import Fork, ForkServer
from harness.process.supervisor import Subprocess, module_arguments
from harness.records import environment
from harness.records.record import WorkerStart
from harness.runner import worker_imports

WORKER = (sys.executable, *module_arguments("harness.runner.worker"))
SERVER = (sys.executable, *module_arguments("harness.runner.worker_server"))
Libraries = tuple[str | int | None, ...]
"""Key of a fork server: an interpreter, a number of threads, and the modules that are imported."""

_MOST_SERVERS = 3
"""Maximum number of fork servers; more exist only if all are busy. Each serves one set of libraries, and takes 0.4 GB."""
_READY_S = 120.0
"""Time limit for the imports of a fork server, in seconds. If one takes longer, all later workers are new processes."""


class WorkerStarter:
    """Starts workers. Leaving the context ends the fork servers.

    command: command that starts a new process as a worker. The numbers of two file descriptors are appended to it. A
    worker is forked only if the command is the default.
    """

    def __init__(self, command: Sequence[str] = WORKER) -> None:
        self._command = command
        self._forks = command == WORKER and fork_server.is_allowed()
        self._servers: dict[Libraries, ForkServer] = {}
        """The running fork servers, from the least to the most recently used."""

    def __enter__(self) -> WorkerStarter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the fork servers, and the forks that still run."""
        for server in self._servers.values():
            server.close()
        self._servers.clear()

    def prepare(self, job: Job) -> None:
        """Start the server that will fork the worker of a job, if there is none yet, and wait for its imports.

        Raises StoreError if the system cannot start it.
        """
        try:
            self._server(job)
        except OSError as error:
            raise _no_worker(error, "") from error

    def start(self, job: Job, log: Path) -> Subprocess | Fork:
        """Start and return the worker of a job. Raises StoreError if the system cannot start it."""
        try:
            with log.open("ab") as output:
                if (server := self._server(job)) is not None:
                    with contextlib.suppress(ConnectionError), _job_file(job, "fork") as stdin:
                        return server.start(stdin, output)
                with _job_file(job, "process") as stdin:
                    command = [job.python or self._command[0], *self._command[1:]]
                    variables = _worker_environment(job.threads, job.gpu)
                    return Subprocess(
                        command, environment=variables, events=True, lifeline=True, stdin=stdin, stdout=output,
                        stderr=subprocess.STDOUT,
                    )  # fmt: skip
        except OSError as error:
            raise _no_worker(error, str(log)) from error

    def _server(self, job: Job) -> ForkServer | None:
        """Return the fork server for a job, started if necessary. None if the worker must be a new process."""
        # If there is a GPU, a library may use it during its import, and no fork could use it afterwards.
        if not self._forks or job.device != "cpu" or environment.gpus():
            return None
        modules = worker_imports.shared(job)
        key = (job.python, job.threads, *modules)
        server = self._servers.pop(key, None)
        if server is not None and not server.is_alive:
            server.close()
            server = None
        if server is None:
            self._make_room()
            command = (job.python or SERVER[0], *SERVER[1:])
            server = ForkServer(command, modules, _worker_environment(job.threads))
            if not server.wait_ready(_READY_S):
                server.close()
                self._forks = False
                return None
        self._servers[key] = server
        return server

    def _make_room(self) -> None:
        """If there are `_MOST_SERVERS` servers, end the idle one that was used least recently."""
        idle = [key for key, server in self._servers.items() if server.is_idle]
        if len(self._servers) >= _MOST_SERVERS and idle:
            self._servers.pop(idle[0]).close()


def _no_worker(error: OSError, where: str) -> StoreError:
    what = f"cannot start a worker: {error.strerror or error}"
    hint = "free some space or memory, then `peft-harness run SUITE --resume RUN`; finished Cells are saved"
    return StoreError(what, where=str(error.filename or where), hint=hint)


@contextlib.contextmanager
def _job_file(job: Job, start: WorkerStart) -> Iterator[IO[bytes]]:
    """Yield a file with the job as JSON. The file has no name, so that even a killed runner leaves no file."""
    with tempfile.TemporaryFile() as file:
        file.write(job.model_copy(update={"start": start}).model_dump_json(by_alias=True).encode())
        file.seek(0)
        yield file


def _worker_environment(threads: int | None = None, gpu: str = "") -> dict[str, str]:
    """Return the worker's environment variables. They forbid downloads, because all assets are on disk."""
    always = {
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "USE_HUB_KERNELS": "NO",  # the hub's cache on a machine must not decide which kernels a model runs
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
        "PYTHONHASHSEED": "0",  # the order of a plug-in's sets must not differ between runs
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # numbers in CUDA_VISIBLE_DEVICES then mean the same as in nvidia-smi
    }
    if threads is not None:  # torch.set_num_threads does not reach a library with a separate OpenMP
        always["OMP_NUM_THREADS"] = str(threads)
    if gpu:
        always["CUDA_VISIBLE_DEVICES"] = gpu
    # The value is an address in the process that set the variable; torch's compiler would read it in the worker.
    inherited = {key: value for key, value in os.environ.items() if key != "_TORCHINDUCTOR_PYOBJECT_TENSOR_DATA_PTR"}
    return inherited | always
