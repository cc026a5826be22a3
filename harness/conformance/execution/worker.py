"""Worker process of `check`: runs the parity suites of one entry point's implementations.

The command is `python -m harness.conformance.execution.worker FD LINE TASK`. TASK is a WorkerTask as JSON. The worker
writes the events of `worker_protocol` to the file descriptor FD. LINE is the descriptor of a pipe: when its other end
closes, the worker dies. If a plug-in prints to stdout, the output goes to stderr.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from harness.conformance.execution.worker_protocol import (
    CaseBegun,
    CheckEnded,
    ModuleMissing,
    Target,
    TargetBegun,
    TargetEnded,
    WorkerTask,
    send,
)
from harness.conformance.findings.outcomes import CheckOutcome, DeviceLostError, Execution
from harness.methods.registry import Implementation, discover, format_error
from harness.process.event_pipe import EventWriter, event_writer


def main(fd: int, line: int, task: WorkerTask) -> None:
    """Run the targets of the task one after the other."""
    if task.device == "cuda":
        # Before CUDA starts: the launch of a kernel then waits for its end, so that an error names the right kernel.
        os.environ.setdefault("CUDA_LAUNCH_BLOCKING", "1")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # for equal bits in two calls
    with event_writer(fd, line) as emit:
        from harness.conformance import process_settings

        before = process_settings.snapshot()
        registry = discover(only=[task.point])
        for target in task.targets:
            name, kind, what = target
            implementation = registry.find(kind, what, name)
            send(emit, TargetBegun(begin=target))
            _run(target, implementation, task, before, emit)
            send(emit, TargetEnded(end=target))


def _run(
    target: Target, implementation: Implementation, task: WorkerTask, before: dict[str, object], emit: EventWriter
) -> None:
    """Run the parity suite of one target, and report the outcome of every check.

    before: process-wide settings before the entry point was imported. An exception outside a check is reported as a
    failure, and ends only this target.
    """
    current = "start-up"

    def begin(case: str) -> None:
        nonlocal current
        current = case
        send(emit, CaseBegun(case=case))

    def report(outcome: CheckOutcome) -> None:
        send(emit, CheckEnded(outcome=outcome))

    try:
        for module in implementation.requires:
            begin(f"importing {module}")
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                # Module a.b is not installed if a or a.b is missing. If c is missing, which a.b imports, a.b is broken.
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                return send(emit, ModuleMissing(missing=f"needs {module}, which is not installed"))
        import torch

        from harness.conformance import process_settings
        from harness.conformance.execution import suite_run

        if changed := process_settings.list_changes(before):
            process_settings.restore(before)
            why = f"importing it: {'; '.join(changed)}"
            report(CheckOutcome.of_whole_target(*target, check="settings", case="import", detail=why))
        device = torch.device(task.device)
        suite_run.stream(implementation, report, breadth=task.breadth, dtypes=task.dtypes, begin=begin, device=device)
    except Exception as error:  # an implementation may raise anything: it is a finding about it
        why = f"raised {format_error(error)}; the remaining checks were not tried"
        raised = Execution.RAISED
        report(CheckOutcome.of_whole_target(*target, check="alive", case=current, detail=why, execution=raised))
        if isinstance(error, DeviceLostError):
            raise  # the next target needs a new process


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), WorkerTask.model_validate_json(sys.argv[3]))
