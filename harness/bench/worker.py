"""Worker process that benchmarks two implementations: `python -m harness.bench.worker FD LINE TASK`.

Writes one JSON line per event to the file descriptor FD: `begin` and `end` with the number of a benchmark, `row`, `memory`,
`missing`, `failed` with the error that ends the process, `done`. Output of plug-ins goes to stderr. Exits when the other end
of the pipe LINE closes.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from harness.bench.sizes import BenchSize
from harness.bench.steps import STEPS, Backbone
from harness.errors import Unsupported
from harness.methods.registry import Implementation, discover, format_error
from harness.process.event_pipe import Emit, event_writer


@contextmanager
def _report_error(emit: Emit) -> Iterator[None]:
    """Emit the error that ends this process, and let it pass."""
    try:
        yield
    except BaseException as error:
        emit(failed=format_error(error))
        raise


def main(fd: int, line: int, task: dict[str, Any]) -> None:
    """Run one task, as `harness.bench.planning` makes it."""
    with event_writer(fd, line) as emit, _report_error(emit):
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
            _run(task, found, registry, emit)
        except Unsupported as error:
            emit(missing=str(error))


def _run(task: dict[str, Any], found: list[Implementation], registry: Any, emit: Emit) -> None:
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
    """Import the required modules; return a sentence about the first that is not installed, or an empty string."""
    for one in implementations:
        for module in one.requires:
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                return f"{one.name} requires {module}, which is not installed"
    return ""


def _facts(task: dict[str, Any]) -> dict[str, Any]:
    import torch

    on_gpu = task["device"] == "cuda"
    return {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]} | (
        {"gpu": torch.cuda.get_device_name()} if on_gpu else {}
    )


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
