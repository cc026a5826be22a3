"""A process that benchmarks two implementations: `python -m harness.bench.worker FD LINE TASK`.

Writes one JSON line per event to the file descriptor FD: `begin` and `end` of a benchmark by its number, `row`, `memory`,
`missing`, `failed` with the last error, `done`. What a plug-in prints goes to stderr. Dies when the other end of the pipe
LINE is gone.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from types import TracebackType
from typing import Any

from harness.bench.sizes import BenchSize
from harness.bench.steps import STEPS, Backbone
from harness.errors import Unsupported
from harness.methods.registry import Implementation, discover, told
from harness.process.event_pipe import Emit, event_writer


class _LastWords:
    """Says what error ends this process, and lets it."""

    def __init__(self, emit: Emit) -> None:
        self.emit = emit

    def __enter__(self) -> None:
        """Do nothing yet."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if error is not None:
            self.emit(failed=told(error))


def main(fd: int, line: int, task: dict[str, Any]) -> None:
    """Do one task of `harness.bench.planning`."""
    with event_writer(fd, line) as emit, _LastWords(emit):
        registry = discover(only=task["points"])
        found = [registry.find(task["kind"], task["target"], name) for name in task["names"]]
        packers = [p for p in task["packers"] if p]
        needed = [*found, *(registry.find("base", task["base"], p) for p in packers)]
        if missing := _missing(needed):
            emit(missing=missing)
            return
        import torch

        torch.set_num_threads(task["threads"])
        try:
            _work(task, found, registry, emit)
        except Unsupported as error:
            emit(missing=str(error))


def _work(task: dict[str, Any], found: list[Implementation], registry: Any, emit: Emit) -> None:
    import torch

    device, facts = torch.device(task["device"]), _facts(task)
    if task["kind"] == "operation":
        from harness.bench.operation_benchmark import OperationBenchmark

        ours, other = found
        bench = OperationBenchmark(task["target"], ours, other, task["dtype"], device, task["pairs"], facts)
        for number, size in enumerate(task["sizes"]):
            emit(begin=number)
            for row in bench.rows(BenchSize(**size)):
                emit(row=row.model_dump(mode="json"))
            emit(end=number)
        return
    from harness.bench import step_benchmark

    step, shape, packers = STEPS[task["step"]], Backbone(**task["backbone"]), task["packers"]
    emit(begin=0)
    if len(found) == 1:
        taken = step_benchmark.memory(step, found[0], packers[0], shape, task["dtype"], device, registry)
        emit(memory=taken)
    else:
        row = step_benchmark.row(
            task["step"], step, (found[0], found[1]), (packers[0], packers[1]), shape, task["dtype"], device,
            task["pairs"], registry, facts,
        )  # fmt: skip
        emit(row=row.model_dump(mode="json"))
    emit(end=0)


def _missing(implementations: list[Implementation]) -> str:
    """Import what they need; say which module is not installed, or nothing."""
    for one in implementations:
        for module in one.requires:
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                return f"{one.name} needs {module}, which is not installed"
    return ""


def _facts(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    on_gpu = task["device"] == "cuda"
    return {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]} | (
        {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
