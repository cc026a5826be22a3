"""Worker of `check`: runs the parity suites of one entry point's implementations.

`python -m harness.conformance.execution.worker FD LINE TASK`, where TASK is a WorkerTask as JSON. It writes the events of
`worker_protocol` to the file descriptor FD; what a plug-in prints to stdout goes to stderr. It dies when the other end of
the pipe LINE is gone.
"""

from __future__ import annotations

import sys
from importlib import import_module

from harness.conformance.execution.worker_protocol import (
    CaseBegun,
    CheckEnded,
    ModuleMissing,
    TargetBegun,
    TargetEnded,
    WorkerTask,
)
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.methods.registry import Implementation, discover, format_error
from harness.process.event_pipe import Emit, event_writer


def main(fd: int, line: int, task: WorkerTask) -> None:
    """Run the targets of the task one after the other."""
    with event_writer(fd, line) as emit:
        from harness.conformance import process_settings

        before = process_settings.snapshot()
        registry = discover(only=[task.point])
        for target in task.targets:
            name, kind, what = target
            implementation = registry.find(kind, what, name)
            emit(**TargetBegun(begin=target).model_dump(mode="json"))
            _run(implementation, task, before, emit)
            emit(**TargetEnded(end=target).model_dump(mode="json"))


def _run(implementation: Implementation, task: WorkerTask, before: dict[str, object], emit: Emit) -> None:
    """Report the outcome of every check. An exception outside a check is one more failure, and ends only this target."""
    at = "start-up"

    def begin(case: str) -> None:
        nonlocal at
        at = case
        emit(**CaseBegun(case=case).model_dump(mode="json"))

    def report(outcome: CheckOutcome) -> None:
        emit(**CheckEnded.of(outcome).model_dump(mode="json"))

    target = implementation.name, implementation.kind, implementation.target
    try:
        for module in implementation.requires:
            begin(f"importing {module}")
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                # "a.b" is not installed if there is no a, or no a.b; but it is, and broken, if the c that it needs is not.
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                reason = f"needs {module}, which is not installed"
                return emit(**ModuleMissing(missing=reason).model_dump(mode="json"))
        from harness.conformance import process_settings
        from harness.conformance.execution import suite_run

        if changed := process_settings.list_changes(before):
            process_settings.restore(before)
            why = f"importing it: {'; '.join(changed)}"
            report(CheckOutcome.of_whole_target(*target, check="settings", case="import", detail=why))
        for outcome in suite_run.run(implementation, breadth=task.breadth, dtypes=task.dtypes, begin=begin):
            report(outcome)
    except Exception as error:  # noqa: BLE001  # an implementation may raise anything: it is a finding about it
        why = f"raised {format_error(error)}; what comes after this was not tried"
        raised = Execution.RAISED
        report(CheckOutcome.of_whole_target(*target, check="alive", case=at, detail=why, execution=raised))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), WorkerTask.model_validate_json(sys.argv[3]))
