"""A process that takes implementations through their parity suites: `python -m harness.conformance.execution.worker FD LINE TASK`.

Writes one JSON line per event to the file descriptor FD: `begin` and `end` of a target, `case`, `tried`, `missing`, `done`.
What a plug-in prints to stdout goes to stderr. Dies when the other end of the pipe LINE is gone.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from typing import Any

from harness.conformance.case_selection import CaseSelection
from harness.conformance.findings.outcomes import CheckOutcome
from harness.methods.registry import Implementation, discover, told
from harness.process.event_pipe import Emit, event_writer
from harness.records.record import CheckResult, Outcome


def main(fd: int, line: int, task: dict[str, Any]) -> None:
    """Try what one entry point offers. task: point, its name; targets as [implementation, kind, target]; breadth; dtypes."""
    with event_writer(fd, line) as emit:
        from harness.conformance import process_settings

        before = process_settings.now()
        registry = discover(only=[task["point"]])
        for name, kind, target in task["targets"]:
            implementation = registry.find(kind, target, name)
            emit(begin=[name, kind, target])
            _try(implementation, task, before, emit)
            emit(end=[name, kind, target])


def _try(implementation: Implementation, task: dict[str, Any], before: dict[str, Any], emit: Emit) -> None:
    """Say what came of every check; whatever escapes them is one more failure, and ends only this target."""
    at = "start-up"

    def begin(case: str) -> None:
        nonlocal at
        at = case
        emit(case=case)

    try:
        for module in implementation.requires:
            begin(f"importing {module}")
            try:
                import_module(module)
            except ModuleNotFoundError as error:
                # "a.b" is not installed if there is no a, or no a.b; but it is, and broken, if the c that it needs is not.
                if not f"{module}.".startswith(f"{error.name}."):
                    raise
                return emit(missing=f"needs {module}, which is not installed")
        from harness.conformance import process_settings
        from harness.conformance.execution import suite_run

        if changed := process_settings.changed(before):
            process_settings.put_back(before)
            emit(tried=_failed(implementation, "settings", "import", f"importing it: {'; '.join(changed)}"))
        for tried in suite_run.run(
            implementation, breadth=CaseSelection(**task["breadth"]), dtypes=tuple(task["dtypes"]), begin=begin
        ):
            emit(tried=tried.model_dump(mode="json"))
    except Exception as error:  # noqa: BLE001  # somebody else's code: whatever it raises is a finding about it
        why = f"raised {told(error)}; what comes after this was not tried"
        emit(tried=_failed(implementation, "alive", at, why))


def _failed(implementation: Implementation, check: str, case: str, why: str) -> dict[str, Any]:
    result = CheckResult(check=f"{implementation.target}/{check}/-/-", outcome=Outcome.FAIL, detail=why)
    return CheckOutcome(
        implementation=implementation.name, kind=implementation.kind, target=implementation.target, dtype="-", case=case,
        result=result,
    ).model_dump(mode="json")  # fmt: skip


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3]))
