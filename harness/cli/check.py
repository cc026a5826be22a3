"""The verb `check`: implementations against their references, as a matrix. No torch: the work is done in other processes."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import get_args

from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.execution import worker_processes
from harness.conformance.execution.worker_protocol import WorkerTask
from harness.conformance.findings import defects
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckStatus
from harness.conformance.findings.report import CheckReport
from harness.conformance.parity_suite import ParitySuite, path_of
from harness.errors import Exit, Problem, SuiteError, UsageError, did_you_mean
from harness.methods.peft_config import NO_REFERENCE, UNREFERENCED
from harness.methods.registry import DTYPES, GROUP, Implementation, Registry, TargetKind, targets
from harness.process.termination import handle_termination
from harness.records.check_id import CheckId
from harness.records.files import unwritable
from harness.report import check_terminal


@dataclass(frozen=True)
class CheckRequest:
    """What to check: everything, if nothing is named.

    breadth: how many cases of every suite. patience: seconds without a result after which an implementation is said to
    hang.
    """

    implementations: Sequence[str] = ()
    methods: Sequence[str] = ()
    operations: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    breadth: CaseSelection = FEW
    jobs: int | None = None
    patience: float = worker_processes.PATIENCE


def check(asked: CheckRequest, as_json: bool, junit: Path | None = None, html: Path | None = None) -> Exit:
    """Check, print, write the files asked for, return the exit code."""
    _places({"--junit": junit, "--html": html})
    with handle_termination():
        report = judge(asked)
    # What was found is printed and written whatever becomes of the other: a full disk, a reader of stdout that has left.
    with contextlib.ExitStack() as afterwards:
        if html is not None:
            from harness.report.check_page import write_page

            afterwards.callback(write_page, report, html)
        if junit is not None:
            from harness.report.check_junit import write_junit

            afterwards.callback(write_junit, report, junit)
        if as_json:
            print(json.dumps(report.document(), indent=1))
        else:
            check_terminal.print_matrix(report)
    return report.exit


def _places(files: dict[str, Path | None]) -> None:
    """Raise UsageError for files that could not be written, before anything takes its minutes."""
    given = {option: file for option, file in files.items() if file is not None}
    odd = {option: why for option, file in given.items() if (why := unwritable(file))}
    if len({file.absolute() for file in given.values()}) < len(given):
        odd = {"--junit, --html": f"{given['--junit']} is to be two files at once"}
    if odd:
        raise UsageError(
            "; ".join(odd.values()), where=", ".join(odd), hint="name a file in a folder that can be written"
        )


def judge(asked: CheckRequest) -> CheckReport:
    """Try what was asked for, what each entry point offers in a process of its own. Raises UsageError for unknown names."""
    from harness.records.environment import describe

    registry = worker_processes.discover(asked.patience)
    _known_names(asked, registry)
    wanted = [i for i in registry.implementations if _asked_for(i, asked)]
    plans, known = _read(wanted)
    tasks, skipped = _tasks(wanted, asked, plans)
    jobs = asked.jobs or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    findings, interrupted = worker_processes.run(tasks, jobs, lambda line: print(line, file=sys.stderr), asked.patience)
    for found in findings:
        skipped |= {f"{name} {target}": why for (name, _, target), why in found.missing.items()}
        if interrupted:
            skipped |= {f"{name} {target}": "interrupted" for name, _, target in found.left}
    # What was left out, by the user, an interruption or for want of a module, may be just where a defect shows.
    left_out = {target for found in findings for target in found.not_tried}
    done = {target for task in tasks for target in task.targets} - left_out
    due = [defect for defect in known if _whole(defect, asked, registry, done)]
    marked, _ = defects.explained([one for found in findings for one in found.tried], known)
    complaints = defects.explained(marked, due)[1]
    needed = {*asked.implementations, *(i.point for i in wanted)}
    broken = {n: w for n, w in registry.broken.items() if not asked.implementations or n in needed}
    compared = {
        one.implementation for one in marked if one.standing not in (CheckStatus.UNSUPPORTED, CheckStatus.SKIPPED)
    }
    untried = [name for name in asked.implementations if name not in compared and name not in broken]
    return CheckReport(marked, skipped, complaints, broken, known, plans, describe().software, interrupted, untried)


def _whole(defect: Defect, asked: CheckRequest, registry: Registry, done: set[tuple[str, TargetKind, str]]) -> bool:
    """Whether everything was tried in which a defect could show, so that one may complain if it did not."""
    by_dtype = all(
        dtype in asked.dtypes or not any(fnmatchcase(dtype, CheckId.parse(pattern).dtype) for pattern in defect.checks)
        for dtype in DTYPES
    )
    return (by_dtype or not asked.dtypes) and all(
        (i.name, i.kind, i.target) in done
        for i in registry.implementations
        if i.name == defect.implementation and _may_show(defect, i) and path_of(i.target).is_file()
    )


def _may_show(defect: Defect, implementation: Implementation) -> bool:
    """Whether a defect could show in this: the name of a base is not in the ids of its checks, those have the Method's."""
    if defect.target or implementation.kind == "base":
        return defect.target in ("", implementation.target)
    return any(fnmatchcase(implementation.target, CheckId.parse(pattern).target) for pattern in defect.checks)


def _read(wanted: Sequence[Implementation]) -> tuple[dict[str, ParitySuite], Sequence[Defect]]:
    """Read the parity suites of what is to be tried, and the known defects; raises SuiteError with every mistake in them."""
    plans: dict[str, ParitySuite] = {}
    known: Sequence[Defect] = ()
    problems: list[Problem] = []
    for target in sorted({i.target for i in wanted if path_of(i.target).is_file()}):
        try:
            plans[target] = parity_suite.load_plan(target)
        except SuiteError as error:
            problems += error.problems
    try:
        known = defects.known()
    except SuiteError as error:
        problems += error.problems
    if problems:
        raise SuiteError(problems)
    return plans, known


def _asked_for(implementation: Implementation, asked: CheckRequest) -> bool:
    if asked.implementations and implementation.name not in asked.implementations:
        return False
    if not asked.methods and not asked.operations:
        return True
    return implementation.target in (asked.operations if implementation.kind == "operation" else asked.methods)


def _tasks(
    wanted: Sequence[Implementation], asked: CheckRequest, plans: dict[str, ParitySuite]
) -> tuple[list[WorkerTask], dict[str, str]]:
    """Group by who offers it, since each process pays for its imports once, and for those alone."""
    grouped: dict[str, list[Implementation]] = {}
    skipped = {}
    for one in wanted:
        if one.target not in plans:
            none = f"there is no parity suite {path_of(one.target).name}"
            skipped[f"{one.name} {one.target}"] = NO_REFERENCE if one.target in UNREFERENCED else none
        elif why := _no_case(one, plans[one.target], asked):
            skipped[f"{one.name} {one.target}"] = why
        else:
            grouped.setdefault(one.point, []).append(one)
    tasks = [
        WorkerTask(
            point=point,
            targets=[(i.name, i.kind, i.target) for i in several],
            breadth=asked.breadth,
            dtypes=tuple(asked.dtypes),
        )
        for point, several in grouped.items()
    ]
    # The longest first, so that at the end no core waits long for another.
    return sorted(tasks, key=lambda task: -sum(_size(plans[target]) for *_, target in task.targets)), skipped


def _no_case(one: Implementation, plan: ParitySuite, asked: CheckRequest) -> str:
    """Say why no case of its parity suite is left for an implementation; nothing if one is."""
    there = [dtype for dtype in plan.dtypes if dtype in (asked.dtypes or DTYPES)]
    if set(one.dtypes) & set(there):
        return ""
    if not there:
        return f"its parity suite has cases in {', '.join(plan.dtypes)} only; asked for were {', '.join(asked.dtypes)}"
    of_these = "of the dtypes asked for, its" if asked.dtypes else "its"
    return f"offers {', '.join(one.dtypes)}; {of_these} parity suite has cases in {', '.join(there)}"


def _size(plan: ParitySuite) -> int:
    """Return about how many checks a suite has."""
    return len(list(plan.cases(FEW))) * len(plan.checks)


def _known_names(asked: CheckRequest, registry: Registry) -> None:
    """Raise one UsageError that names everything that nobody knows or offers."""
    odd = [f"unknown {one}" for one in _unknown(asked, registry)] or list(_not_offered(asked, registry))
    if odd:
        raise UsageError(
            "; ".join(odd), hint="`peft-harness list implementations` shows who offers what, in which dtypes"
        )


def _unknown(asked: CheckRequest, registry: Registry) -> Iterator[str]:
    kinds = targets()
    there = {kind: sorted(name for name, of in kinds.items() if of == kind) for kind in get_args(TargetKind)}
    names = sorted({i.name for i in registry.implementations})
    yours = f"; yours? name it in an entry point of the group {GROUP}, and install it"
    if registry.broken:
        broken = ", ".join(f"`{point}` ({why})" for point, why in registry.broken.items())
        yours += f"; or is it of an entry point that could not be used: {broken}"
    for what, given, known in (
        ("implementation", asked.implementations, names),
        ("method", asked.methods, [*there["method"], *there["base"]]),
        ("operation", asked.operations, there["operation"]),
        ("dtype", asked.dtypes, DTYPES),
    ):
        for name in given:
            if name in known or (what == "implementation" and name in registry.broken):
                continue
            hint = did_you_mean(name, known, "there are")
            if what != "dtype" and name in kinds:
                hint = f"that is of kind `{kinds[name]}`: {'--op' if kinds[name] == 'operation' else '--method'} {name}"
            yield f"{what} {name!r}: {hint}{yours if what == 'implementation' else ''}"


def _not_offered(asked: CheckRequest, registry: Registry) -> Iterator[str]:
    """Say which implementations that were named offer nothing of what was asked."""
    for name in asked.implementations:
        offers = [i for i in registry.implementations if i.name == name]
        if offers and not any(_asked_for(i, asked) for i in offers):
            wanted = ", ".join([*asked.methods, *asked.operations])
            yield f"{name} does not offer {wanted}, only {', '.join(sorted({i.target for i in offers}))}"
