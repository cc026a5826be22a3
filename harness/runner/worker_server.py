"""Fork the workers of Cells: `python -m harness.runner.worker_server LIFELINE MODULE...`.

Standard input is the socket of a `ForkServer`. Each fork runs one Cell, as `harness.runner.worker` does.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import socket
import sys
from importlib import import_module

from harness.process.fork_server import serve
from harness.process.lifeline import die_with_parent
from harness.process.signals import TERMINATION_SIGNALS
from harness.records import environment
from harness.runner import worker, worker_imports

_OF_EACH_CELL = ("torch", "harness.cell.lifecycle", "harness.memory_model.cell_prediction", "harness.cell.measure.gpu")


def main(argv: list[str]) -> int:
    """Import the modules, then fork a worker for each request. Return 0 when the runner ends the server."""
    lifeline, modules = int(argv[1]), argv[2:]
    for number in (signal.SIGINT, *TERMINATION_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(lifeline, sys.stdin.fileno())
    for module in (*_OF_EACH_CELL, *modules):
        with contextlib.suppress(ImportError):  # the worker tries again, and reports the missing module
            import_module(module)
    _fill_caches()
    gc.collect()
    gc.freeze()  # without this, a collection in a fork would copy each page that has an object
    with socket.socket(fileno=0) as connection:
        return serve(connection, lambda events, cut: worker.main(["", str(events), str(cut)]))


def _fill_caches() -> None:
    """Fill caches that each fork would otherwise fill for itself. Filling takes longer than a tiny Cell runs."""
    environment.describe()  # code and git are stored for all forks; git takes two processes
    worker_imports.own_registry()  # imports the modules of the harness's own implementations
    worker_imports.compile_name_patterns()


if __name__ == "__main__":
    os._exit(main(sys.argv))
