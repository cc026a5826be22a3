"""Worker process that benchmarks two implementations: `python -m harness.bench.worker FD LINE TASK`.

FD and LINE are file descriptors. The worker writes one JSON line per event to FD, and is killed when the other end of
LINE closes. TASK is a `BenchTask` in JSON. Output of plug-ins goes to stderr.

The events are: `begin` and `end` (position of a size in the task), `timing` (`begin`, `end` or `changed`; see
`timing.Announce`), `row` and `memory` (results), `missing` (reason why nothing was measured), `failed` (error that ends
the process), `lost` (error after which the GPU accepts no more work of the process), and `done` (the last event).
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from typing import Any

from harness.bench.sizes import BenchSize
from harness.bench.steps import Backbone
from harness.errors import Unsupported
from harness.methods.registry import Implementation, discover, format_error
from harness.process.event_pipe import EventWriter, event_writer


def main(fd: int, line: int, task: dict[str, Any]) -> None:
    """Run one task and write its events to `fd`. task: the result of `BenchTask.document`."""
    # This must precede the import of torch, because torch.set_num_threads does not reach every copy of OpenMP.
    os.environ["OMP_NUM_THREADS"] = str(task["threads"])
    with event_writer(fd, line) as emit:
        try:
            _run(task, emit)
        except Unsupported as error:
            emit(missing=str(error))
        except BaseException as error:
            from harness.conformance.findings.outcomes import DeviceLostError

            emit(**{"lost" if isinstance(error, DeviceLostError) else "failed": format_error(error)})
            raise


def _run(task: dict[str, Any], emit: EventWriter) -> None:
    # Before the plug-ins, so that the clock of the samples is the original one.
    from harness.bench import timing  # noqa: F401

    registry = discover(only=task["points"])
    found = [registry.find(task["kind"], task["target"], name) for name in task["names"]]
    packers = [registry.find("base", task["base"], packer) for packer in task["packers"] if packer]
    if missing := _missing([*found, *packers]):
        emit(missing=missing)
        return
    import torch

    torch.set_num_threads(task["threads"])
    device = torch.device(task["device"])
    facts: dict[str, Any] = {"threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()

    def announce(which: str) -> None:
        emit(timing=which)

    if task["kind"] == "operation":
        from harness.bench.operation_benchmark import OperationBenchmark

        ours, other = found
        bench = OperationBenchmark(task["target"], ours, other, task["dtype"], device, task["pairs"], facts, announce)
        for number, size in enumerate(task["sizes"]):
            emit(begin=number)
            for row in bench.rows(BenchSize(**size)):
                emit(row=row.model_dump(mode="json"))
            emit(end=number)
        return
    from harness.bench import step_benchmark
    from harness.bench.adapted_llama import StepSetting

    setting = StepSetting(task["step"], Backbone(**task["backbone"]), task["dtype"], device, registry)
    emit(begin=0)
    if len(found) == 1:
        emit(memory=step_benchmark.memory(setting, found[0], task["packers"][0]))
    else:
        step_row = step_benchmark.row(setting, found, task["packers"], task["pairs"], facts, announce)
        emit(row=step_row.model_dump(mode="json"))
    emit(end=0)


def _missing(implementations: list[Implementation]) -> str:
    """Import the modules that the implementations require.

    If a module is not installed, return a sentence that names it. Otherwise, return an empty string.
    """
    for one in implementations:
        for module in one.requires:
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                return f"{one.name} requires {module}, which is not installed"
    return ""


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
