"""Run the command `check`: compare implementations with their references. Only its worker processes import torch.

A parity suite is a file in suites/parity with the cases and checks of one target, e.g. a Method or an Operation.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import distributions
from pathlib import Path
from typing import Literal

from harness.assets.environments import homes
from harness.assets.environments.folder import MadeEnvironment
from harness.assets.environments.packages import IndexOptions
from harness.bench.gpu import no_gpu
from harness.cli import check_tasks, environments
from harness.conformance import checks, parity_suite
from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.execution import worker_processes
from harness.conformance.execution.worker_protocol import Target
from harness.conformance.findings import defects
from harness.conformance.findings.defects import Defect
from harness.conformance.findings.outcomes import CheckStatus
from harness.conformance.findings.report import CheckReport
from harness.conformance.findings.versions import CheckedEnvironment
from harness.conformance.parity_suite import ParitySuite, path_of
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit, HarnessError, Problem, SuiteError, plural, usage_error
from harness.methods.known_names import NameOption
from harness.methods.peft_config import UNREFERENCED
from harness.methods.registry import DTYPES, GROUP, Implementation, Registry, TargetKind, targets
from harness.process.signals import handle_termination, one_interrupt
from harness.process.worker_pool import WorkerPool
from harness.records.check import CheckId
from harness.records.environment import code_version, describe
from harness.records.files import refuse_unwritable
from harness.report import check_terminal, check_versions


@dataclass(frozen=True)
class CheckRequest:
    """Arguments and options of a check. An empty sequence of names or dtypes stands for all of them."""

    implementations: Sequence[str] = ()
    methods: Sequence[str] = ()
    operations: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    breadth: CaseSelection = FEW
    """Selection of the cases of each parity suite."""
    jobs: int | None = None
    patience: float = worker_processes.PATIENCE
    """Seconds without a result after which an implementation counts as hanging."""
    environments: Sequence[str] = ()
    """Names or requirements, e.g. `peft==0.19.1`, of the environments in which to check. Empty for this Python."""
    device: Literal["cpu", "cuda"] = "cpu"
    """The device of the tensors."""
    index: IndexOptions = field(default_factory=IndexOptions)
    """Sources from which pip takes the packages of environments that do not exist yet."""


def check(request: CheckRequest, as_json: bool, junit: Path | None = None, html: Path | None = None) -> Exit:
    """Run the checks, print the report, write the requested files, and return the exit code."""
    refuse_unfit_files(junit, html)
    with one_interrupt():
        with handle_termination():
            if request.device == "cuda" and (why := no_gpu()):
                raise HarnessError(why, where="--device cuda", hint="without it, the checks run on the CPU")
            report = judge(request)
        return publish(report, as_json, junit, html)


def refuse_unfit_files(junit: Path | None, html: Path | None) -> None:
    """Raise UsageError if a requested file cannot be written, or if `html` is not an .html file. Call this before the
    checks."""
    refuse_unwritable({"--junit": junit, "--html": html})
    if html is not None:
        from harness.report.html import page_path

        page_path(html, "--html")


def publish(report: CheckReport, as_json: bool, junit: Path | None, html: Path | None) -> Exit:
    """Print a report, write the requested files, and return the exit code."""
    # Printing and each file are independent: a full disk or a closed stdout does not prevent the other outputs.
    with contextlib.ExitStack() as afterwards:
        if html is not None:
            from harness.report.check_page import write_page

            afterwards.callback(write_page, report, html)
        if junit is not None:
            from harness.report.check_junit import write_junit

            afterwards.callback(write_junit, report, junit)
        if as_json:
            labelled = any(one.environment for one in report.tried)
            by_version = {"versions": check_versions.document(report)} if labelled else {}
            print_json(report.document() | by_version)
        else:
            print_lines(check_terminal.matrix(report))
    return report.exit


def judge(request: CheckRequest) -> CheckReport:
    """Run the requested checks in worker processes, and return the report.

    If the request names no environments, some implementations may need libraries that this Python lacks. Each of them
    runs in the environment that suites/environments.yaml or a user's file declares for it, if this environment exists.
    Raises UsageError for unknown names.
    """
    if request.environments:
        reports = []
        for environment in environments.ensure_all(request.environments, request.index):
            reports.append(_judge_in(request, environment)[0])
            if reports[-1].interrupted:
                break
        return CheckReport.joined(reports)
    report, missing = _judge_in(request, None)
    return report if report.interrupted else _with_declared_environments(report, missing, request)


def _with_declared_environments(report: CheckReport, missing: Collection[Target], request: CheckRequest) -> CheckReport:
    """Check the targets `missing`, and return `report` with their results.

    missing: targets whose libraries this Python lacks. Each is checked in the environment that suites/environments.yaml
    or a user's file declares for its implementation. If this environment does not exist, the target stays skipped, and
    the reason names the command that makes the environment.
    """
    found = homes.of({name for name, *_ in missing})
    skipped, there = dict(report.skipped), dict[Path, set[str]]()
    for name, _, target in missing:
        home = found.get(name)
        if isinstance(home, MadeEnvironment):
            del skipped[f"{name} {target}"]
            there.setdefault(home.folder, set()).add(name)
        elif home:
            skipped[f"{name} {target}"] += f"; `peft-harness env create {home}` makes an environment that has it"
    moved = {name for names in there.values() for name in names}
    report = replace(report, skipped=skipped, untried=[name for name in report.untried if name not in moved])
    others = [
        _judge_in(replace(request, implementations=sorted(names)), homes.at(folder))[0]
        for folder, names in there.items()
    ]
    known = set(report.skipped.values())  # a reason that does not depend on the environment is given only once
    others = [replace(one, skipped={n: w for n, w in one.skipped.items() if w not in known}) for one in others]
    return CheckReport.joined([report, *others])


def _judge_in(request: CheckRequest, environment: MadeEnvironment | None) -> tuple[CheckReport, Collection[Target]]:
    """Run the checks in one environment, or in this Python. Return the report, and targets whose libraries are missing."""
    python = environment.python if environment is not None else None
    targets = len(request.implementations) * len({*request.methods, *request.operations})
    # The pool's server imports torch while another process imports the plug-ins.
    with worker_processes.worker_pool(request.device, python, few=0 < targets <= _jobs(request)) as pool:
        return _judge_with(pool, request, environment)


def _jobs(request: CheckRequest) -> int:
    """Return the largest number of workers at a time."""
    return request.jobs or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)


def _judge_with(
    pool: WorkerPool, request: CheckRequest, environment: MadeEnvironment | None
) -> tuple[CheckReport, Collection[Target]]:
    """Run the checks in the workers of `pool`. The parameters and the result are those of `_judge_in`."""
    python, label = (environment.python, environment.label) if environment is not None else (None, "")
    registry = worker_processes.discover(request.patience, python)
    described = registry.environment or describe()
    if environment is not None and described.code_version != code_version():
        raise HarnessError(
            f"environment {label} runs other code of the harness than this command",
            where=str(python),
            hint="install the harness, e.g. by `pip install -e .`, and remove the environment: `peft-harness env remove`",
        )
    _require_known_names(request, registry)
    wanted = [i for i in registry.implementations if _is_requested(i, request)]
    plans, known = _read(wanted)
    jobs = _jobs(request)
    tasks, skipped = check_tasks.tasks(wanted, request, plans, jobs)

    def progress(line: str) -> None:
        print_note(f"{label}: {line}" if label else line)

    findings, interrupted = worker_processes.run(tasks, pool, jobs, progress, request.patience)
    for found in findings:
        skipped |= {f"{name} {target}": why for (name, _, target), why in found.missing.items()}
        if interrupted:
            tried = Counter((one.implementation, one.target) for one in found.tried)
            skipped |= {
                f"{name} {target}": f"interrupted after {plural(tried[name, target], 'check')}"
                for name, _, target in found.left
            }
    # The options, an interruption or a missing module may have left out the checks that show a defect.
    omitted = {target for found in findings for target in found.not_tried}
    done = {target for task in tasks for target in task.targets} - omitted
    if not request.breadth.is_whole:
        named = {(one.implementation, one.kind, one.target) for found in findings for one in found.tried}
        without = sorted(done - named)
        if not (request.methods or request.operations) and len(without) > 1:
            skipped[f"{len(without)} targets"] = check_tasks.why_nothing(request.breadth, [])
        else:
            reasons = {
                f"{name} {of}": check_tasks.why_nothing(request.breadth, plans[of].checks) for name, _, of in without
            }
            skipped |= reasons
    due = [_tried_part(defect, request) for defect in known if _was_fully_tried(defect, request, registry, done)]
    software = described.software
    marked, _ = defects.explained([one for found in findings for one in found.tried], known, software)
    complaints = defects.explained(marked, due, software)[1]
    needed = {*request.implementations, *(i.point for i in wanted)}
    broken = {n: w for n, w in registry.broken.items() if not request.implementations or n in needed}
    compared = {
        one.implementation for one in marked if one.status not in (CheckStatus.UNSUPPORTED, CheckStatus.SKIPPED)
    }
    # A shard may have no case of an implementation. With --case or --check, a misspelt text must not pass.
    is_part = bool(done) and replace(request.breadth, shard=(1, 1)).is_whole and request.breadth.shard != (1, 1)
    expected = set(request.implementations) - ({name for name, *_ in done} if is_part else set())
    untried = [n for n in request.implementations if n in expected and n not in compared and n not in broken]
    options = [f"--dtype {dtype}" for dtype in request.dtypes] + request.breadth.options
    options += ["--device cuda"] if request.device == "cuda" else []
    options += [f"--patience {request.patience:g}"] if request.patience != worker_processes.PATIENCE else []
    report = CheckReport(
        marked,
        skipped,
        complaints,
        broken,
        known,
        plans,
        software,
        interrupted,
        untried,
        options=options,
        is_part=is_part,
    )
    if environment is not None:
        checked = CheckedEnvironment(
            label=label,
            name=environment.name,
            requirements=environment.file.spec.requirements,
            packages=environment.file.packages,
            environment=described,
        )
        # With --with, the same implementation runs in several environments. Otherwise its name is enough.
        report = report.labelled(checked) if request.environments else replace(report, environments=[checked])
    return report, {target for found in findings for target in found.missing}


def _was_fully_tried(
    defect: Defect, request: CheckRequest, registry: Registry, done: set[tuple[str, TargetKind, str]]
) -> bool:
    """Return whether all checks that could show a known defect were tried.

    If so, a defect that did not show is reported as a finding.
    """
    by_dtype = all(
        dtype in request.dtypes
        or not any(fnmatchcase(dtype, CheckId.parse(pattern).dtype) for pattern in defect.checks)
        for dtype in DTYPES
    )
    return (
        (by_dtype or not request.dtypes)
        and request.breadth.is_whole  # an entry may name any check by `*`
        and all(
            (i.name, i.kind, i.target) in done
            for i in registry.implementations
            if i.name == defect.implementation and _may_show(defect, i) and path_of(i.target).is_file()
        )
    )


def _tried_part(defect: Defect, request: CheckRequest) -> Defect:
    """Return the defect. Without the option `--wide`, leave out its checks that need this option."""
    if request.breadth.is_wide:
        return defect
    wide = checks.names_of_wide()
    return defect.model_copy(update={"checks": [one for one in defect.checks if CheckId.parse(one).check not in wide]})


def _may_show(defect: Defect, implementation: Implementation) -> bool:
    """Return whether the checks of an implementation could show a known defect.

    If the defect names a target (e.g. a Method), only implementations of this target can show it. Otherwise, the
    targets in its check ids decide. But these ids name no base, so any implementation of a base can show the defect.
    """
    if defect.target or implementation.kind == "base":
        return defect.target in ("", implementation.target)
    return any(fnmatchcase(implementation.target, CheckId.parse(pattern).target) for pattern in defect.checks)


def _read(wanted: Sequence[Implementation]) -> tuple[dict[str, ParitySuite], Sequence[Defect]]:
    """Read and return the parity suites of the implementations, by target, and the known defects.

    Raises one SuiteError with the mistakes in all files.
    """
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


def _is_requested(implementation: Implementation, request: CheckRequest) -> bool:
    if request.implementations and implementation.name not in request.implementations:
        return False
    if not request.methods and not request.operations:
        return True
    return implementation.target in (request.operations if implementation.kind == "operation" else request.methods)


def _require_known_names(request: CheckRequest, registry: Registry) -> None:
    """Raise one UsageError with all unknown names."""
    if problems := list(_unknown(request, registry)) or list(_not_offered(request, registry)):
        raise usage_error(problems)


def _unknown(request: CheckRequest, registry: Registry) -> Iterator[Problem]:
    checked = {name: kind for name, kind in targets().items() if name not in UNREFERENCED}
    operations = sorted(name for name, kind in checked.items() if kind == "operation")
    methods = sorted((name for name in checked if name not in operations), key=lambda name: checked[name] != "method")
    of_arguments = NameOption("check", "implementation", sorted({i.name for i in registry.implementations}))
    of_methods = NameOption("--method", "method", methods)
    of_operations = NameOption("--op", "operation", operations)
    yours = f"for your own, add an entry point of the group {GROUP} and install it"
    if registry.broken:
        broken = ", ".join(f"`{point}` ({why})" for point, why in registry.broken.items())
        yours += f"; entry points that could not be loaded: {broken}"
    known = {i.name for i in registry.implementations} | {*registry.broken}
    named_checks = [name for name in request.implementations if name in checks.docstrings().keys() - known]
    for name in named_checks:
        there = f"select it by `--check {name}`; " if name in parity_suite.check_names() else ""
        hint = f"{there}`peft-harness explain {name}` states its rule"
        yield Problem("check", f"{name!r} is a check, not an implementation", hint)
    implementations = [name for name in request.implementations if name not in {*registry.broken, *named_checks}]
    points = (point for distribution in distributions() for point in distribution.entry_points)
    if {*implementations} - known and (found := [p for p in points if "harness" in p.group and p.group != GROUP]):
        groups = ", ".join(f"`{point.name}` is in {point.group}" for point in found)
        yours += f"; entry points in groups that are not read: {groups}"
    yield from of_arguments.unknown(implementations, (of_operations, of_methods), yours, always=bool(registry.broken))
    referenced = [name for name in request.methods if name not in UNREFERENCED]
    yield from of_methods.unknown(referenced, (of_operations, of_arguments))
    yield from of_operations.unknown(request.operations, (of_methods, of_arguments))
    yield from NameOption("--dtype", "dtype", DTYPES).unknown(request.dtypes)
    if request.breadth.checks:  # otherwise no other suite need be read
        yield from NameOption("--check", "check", sorted(parity_suite.check_names())).unknown(request.breadth.checks)


def _not_offered(request: CheckRequest, registry: Registry) -> Iterator[Problem]:
    """Yield a problem for each requested implementation that implements none of the requested targets.

    If there is none, yield a problem for each requested target that no requested implementation implements.
    """
    hint = "`peft-harness list implementations` shows who offers what"
    requested = [*request.methods, *request.operations]
    offered = {name: {i.target for i in registry.implementations if i.name == name} for name in request.implementations}
    alone = [name for name, targets in offered.items() if targets and requested and not targets.intersection(requested)]
    for name in alone:
        what = f"{name} does not offer {', '.join(requested)}, only {', '.join(sorted(offered[name]))}"
        yield Problem("check", what, hint)
    if alone or not offered or not all(offered.values()):  # a broken entry point may offer the target
        return
    for target in [one for one in dict.fromkeys(requested) if not any(one in there for there in offered.values())]:
        yield Problem("check", f"none of the named implementations offers {target}", hint)
