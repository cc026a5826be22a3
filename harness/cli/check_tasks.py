"""Divide the work of `check` into tasks, one per worker process. Imports no torch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from harness.conformance import checks
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.execution import worker_processes
from harness.conformance.execution.worker_protocol import WorkerTask
from harness.conformance.parity_suite import OperationSuite, ParitySuite, path_of
from harness.methods.peft_config import NO_REFERENCE, UNREFERENCED
from harness.methods.registry import DTYPES, Implementation

if TYPE_CHECKING:
    from harness.cli.check_run import CheckRequest

REFERENCE = "reference"
"""Name of the implementations that all others are compared with."""
_TASKS_PER_JOB = 12
"""Number of tasks of equal size per job if it costs little to start a process. So no core is idle for long at the end."""


def tasks(
    wanted: Sequence[Implementation], request: CheckRequest, plans: dict[str, ParitySuite], jobs: int
) -> tuple[list[WorkerTask], dict[str, str]]:
    """Return the worker tasks, and the skipped targets: target -> reason.

    A task has only targets of one entry point, so that its process imports one plug-in. If an entry point has more to do
    than its share of a process, its targets are divided into several tasks of similar size.

    If no name and no option selects cases or dtypes, the reference is left out, unless no other implementation remains:
    comparing it with itself would take a third of the time of `check`.
    """
    grouped: dict[str, list[Implementation]] = {}
    skipped = {}
    is_usual = not request.implementations and request.breadth == FEW and not request.dtypes
    compared = [one for one in wanted if one.name != REFERENCE] if is_usual else wanted
    if compared and len(compared) < len(wanted):
        why = f"all others are compared with it; `peft-harness check {REFERENCE}` compares it with itself"
        skipped[REFERENCE] = why
    for one in compared or wanted:
        if one.target not in plans:
            none = f"there is no parity suite {path_of(one.target).name}"
            skipped[f"{one.name} {one.target}"] = NO_REFERENCE if one.target in UNREFERENCED else none
        elif why := _why_no_case(one, plans[one.target], request):
            skipped[f"{one.name} {one.target}"] = why
        else:
            grouped.setdefault(one.point, []).append(one)
    sizes = {target: _size(plan) for target, plan in plans.items()}

    def total(several: Iterable[Implementation]) -> int:
        return sum(sizes[one.target] for one in several)

    number = jobs * (_TASKS_PER_JOB if jobs > 1 and worker_processes.forks(request.device) else 1)
    share = max(1, total(itertools.chain(*grouped.values())) / number)
    tasks = [
        WorkerTask(
            point=point,
            targets=[(i.name, i.kind, i.target) for i in part],
            breadth=request.breadth,
            dtypes=tuple(request.dtypes),
            device=request.device,
        )
        for point, several in grouped.items()
        for part in _parts(several, math.ceil(total(several) / share), sizes)
    ]
    # The longest tasks come first, so that no core is idle for long at the end.
    return sorted(tasks, key=lambda t: -sum(sizes[target] for *_, target in t.targets)), skipped


def _parts(several: Sequence[Implementation], number: int, sizes: dict[str, int]) -> list[list[Implementation]]:
    """Divide implementations into at most `number` lists of similar size, and return the lists. No list is empty."""
    parts: list[list[Implementation]] = [[] for _ in range(min(number, len(several)))]
    for one in sorted(several, key=lambda one: -sizes[one.target]):
        min(parts, key=lambda part: sum(sizes[i.target] for i in part)).append(one)
    return parts


def _why_no_case(one: Implementation, plan: ParitySuite, request: CheckRequest) -> str:
    """Return why an implementation has no case in its parity suite for the requested dtypes and device.

    If it has a case, return an empty string.
    """
    if request.device not in one.devices:
        option = "--op" if one.kind == "operation" else "--method"
        command = f"peft-harness check {one.name} {option} {one.target} --device {one.devices[0]}"
        return f"runs on {', '.join(one.devices)} only; there, `{command}` checks it"
    if request.device == "cuda" and one.kind == "loader":
        return "files are judged on the CPU: run `check` without --device cuda"
    possible = [dtype for dtype in plan.dtypes if dtype in (request.dtypes or DTYPES)]
    if set(one.dtypes) & set(possible):
        return ""
    if not possible:
        return f"its parity suite has cases in {', '.join(plan.dtypes)} only; requested: {', '.join(request.dtypes)}"
    requested = "of the requested dtypes, its" if request.dtypes else "its"
    return f"offers {', '.join(one.dtypes)}; {requested} parity suite has cases in {', '.join(possible)}"


def _size(plan: ParitySuite) -> int:
    """Return the approximate duration of a suite, in an arbitrary unit.

    Only the examples are counted. A Method's check takes longer than an Operation's, but an Operation has more other cases.
    """
    return len(list(plan.cases(FEW))) * len(plan.checks) * (1 if isinstance(plan, OperationSuite) else 2)


def why_nothing(breadth: CaseSelection, of_target: Sequence[str]) -> str:
    """Return why the options --case, --check and --shard left no check of a target.

    of_target: names of the checks of its parity suite; empty if the reason is given for several targets.
    """
    if of_target and breadth.checks and not set(breadth.checks) & set(of_target):
        return f"it has no check {' or '.join(breadth.checks)}; its checks: {', '.join(of_target)}"
    if breadth.shard != (1, 1):
        whole = replace(breadth, shard=(1, 1))
        because = "" if whole.is_whole else f", or {why_nothing(whole, of_target)}"
        return f"no case of this target is in shard {breadth.shard[0]} of {breadth.shard[1]}{because}"
    if not breadth.checks:
        full = ", and --drawn tries any case by its full name and dtype" if breadth.drawn else ""
        return (
            f"no case that these options try has {breadth.case!r} in its name and dtype; `--json` without --case lists the "
            f"cases{full}"
        )
    named = f"the check{'s' if len(breadth.checks) > 1 else ''} {', '.join(breadth.checks)}"
    if breadth.case:
        # Without --wide, a check may run in the suite's typical case alone, which --case may leave out.
        hint = "" if breadth.is_wide else "; --wide runs more checks in each case"
        return f"no case with {breadth.case!r} in its name and dtype runs {named} with these options{hint}"
    hint = (
        "; add --wide"
        if not breadth.is_wide and checks.names_of_wide(never_by_default=True) & {*breadth.checks}
        else ""
    )
    return f"{named} {'do' if len(breadth.checks) > 1 else 'does'} not run with these options{hint}"
