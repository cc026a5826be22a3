"""The verb `check`: implementations against their references, as a matrix. No torch: the work is done in other processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.conformance import defects, isolated, show, suite
from harness.conformance.defects import Defect
from harness.conformance.suite import Plan, path_of
from harness.conformance.tried import Standing, Tried
from harness.errors import Exit, Problem, SuiteError, UsageError
from harness.methods import methods
from harness.registry import DTYPES, GROUP, Implementation, Registry
from harness.runner.stop import on_request
from harness.spelling import near


@dataclass(frozen=True)
class Asked:
    """What to check: everything, if nothing is named.

    full: the whole product of every suite instead of its diagonal. patience: seconds without a result after which an
    implementation is said to hang.
    """

    implementations: Sequence[str] = ()
    methods: Sequence[str] = ()
    operations: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    full: bool = False
    jobs: int | None = None
    patience: float = isolated.PATIENCE


@dataclass(frozen=True)
class Report:
    """What came of it.

    skipped: what was not tried, and why. complaints: known defects that did not show. broken: plug-ins that could not be
    loaded. defects: those known, of whatever library. plans: target -> its parity suite. software: library -> version.
    """

    tried: list[Tried]
    skipped: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    defects: Sequence[Defect] = ()
    plans: dict[str, Plan] = field(default_factory=dict)
    software: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    def count(self, standing: Standing) -> int:
        """Count the results of one standing."""
        return sum(one.standing is standing for one in self.tried)

    def shown_defects(self) -> list[Defect]:
        """List the known defects that explain a failure here."""
        ids = {one.defect for one in self.tried}
        return [defect for defect in self.defects if defect.id in ids]

    @property
    def exit(self) -> Exit:
        """Interrupted is 4; a failure, a broken plug-in or a defect that did not show is 1; nothing tried is 5."""
        if self.interrupted:
            return Exit.INFRASTRUCTURE
        if self.count(Standing.FAIL) or self.complaints or self.broken:
            return Exit.FAIL
        return Exit.PASS if self.count(Standing.PASS) else Exit.NOTHING_COMPARED

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        rows = [
            {**one.model_dump(mode="json"), "standing": one.standing.value, "share": one.share} for one in self.tried
        ]
        return {
            "schema": 2, "exit": int(self.exit), "interrupted": self.interrupted, "software": self.software, "checks": rows,
            "skipped": self.skipped, "complaints": self.complaints, "broken": self.broken,
            "defects": [defect.model_dump(mode="json") for defect in self.shown_defects()],
        }  # fmt: skip


def check(asked: Asked, as_json: bool, junit: Path | None = None, html: Path | None = None) -> Exit:
    """Check, print, write the files asked for, return the exit code."""
    _places(junit, html)
    with on_request():
        report = judge(asked)
    if junit is not None:
        from harness.report.junit import write_junit

        write_junit(report, junit)
    if html is not None:
        from harness.report.conformance_page import write_page

        write_page(report, html)
    if as_json:
        print(json.dumps(report.document(), indent=1))
    else:
        show.print_matrix(report)
    return report.exit


def _places(*files: Path | None) -> None:
    """Raise UsageError for a file that could not be written, before anything takes its minutes."""
    given = [file for file in files if file is not None]
    odd = [f"{file}: there is no folder {file.parent}" for file in given if not file.parent.is_dir()]
    if len({file.absolute() for file in given}) < len(given):
        odd.append(f"{given[0]} is to be two files at once")
    if odd:
        raise UsageError("; ".join(odd), where="--junit, --html", mend="name other files")


def judge(asked: Asked) -> Report:
    """Try what was asked for, each implementation in a process of its own. Raises UsageError for unknown names."""
    from harness.measure.environment import describe

    registry = isolated.discover(asked.patience)
    _known_names(asked, registry)
    wanted = [i for i in registry.implementations if _asked_for(i, asked)]
    plans, known = _read(wanted)
    tasks, skipped = _tasks(wanted, asked)
    jobs = asked.jobs or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    findings, interrupted = isolated.run(tasks, jobs, lambda line: print(line, file=sys.stderr), asked.patience)
    for task, found in zip(tasks, findings, strict=True):
        skipped |= {f"{task.implementation} {target}": why for (_, target), why in found.missing.items()}
        if interrupted:
            skipped |= {f"{task.implementation} {target}": "interrupted" for _, target in found.left}
    marked, complaints = defects.explained([one for found in findings for one in found.tried], known)
    broken = {n: w for n, w in registry.broken.items() if not asked.implementations or n in asked.implementations}
    # An interruption may have left out just the case in which a defect shows.
    complaints = [] if interrupted else complaints
    return Report(marked, skipped, complaints, broken, known, plans, describe().software, interrupted)


def _read(wanted: Sequence[Implementation]) -> tuple[dict[str, Plan], Sequence[Defect]]:
    """Read the parity suites of what is to be tried, and the known defects; raises SuiteError with every mistake in them."""
    plans: dict[str, Plan] = {}
    known: Sequence[Defect] = ()
    problems: list[Problem] = []
    for kind, target in sorted({(i.kind, i.target) for i in wanted if path_of(i.target).is_file()}):
        try:
            plans[target] = suite.load_operation(target) if kind == "operation" else suite.load(target)
        except SuiteError as error:
            problems += error.problems
    try:
        known = defects.known()
    except SuiteError as error:
        problems += error.problems
    if problems:
        raise SuiteError(problems)
    return plans, known


def _asked_for(implementation: Implementation, asked: Asked) -> bool:
    if asked.implementations and implementation.name not in asked.implementations:
        return False
    if not asked.methods and not asked.operations:
        return True
    return implementation.target in (asked.operations if implementation.kind == "operation" else asked.methods)


def _tasks(wanted: Sequence[Implementation], asked: Asked) -> tuple[list[isolated.Task], dict[str, str]]:
    """Group by implementation, since each process pays for its imports once."""
    grouped: dict[str, list[Implementation]] = {}
    skipped = {}
    for one in wanted:
        if path_of(one.target).is_file():
            grouped.setdefault(one.name, []).append(one)
        else:
            skipped[f"{one.name} {one.target}"] = f"there is no parity suite {path_of(one.target).name}"
    tasks = [
        isolated.Task(
            name, [(i.kind, i.target) for i in several], asked.full, tuple(asked.dtypes),
            tuple(sorted({i.point for i in several})),
        )
        for name, several in grouped.items()
    ]  # fmt: skip
    return tasks, skipped


def _known_names(asked: Asked, registry: Registry) -> None:
    """Raise one UsageError that names every name nobody knows."""
    if odd := list(_unknown(asked, registry)):
        raise UsageError("unknown " + "; unknown ".join(odd), mend="`peft-harness list implementations` shows them all")


def _unknown(asked: Asked, registry: Registry) -> Iterator[str]:
    targets = {
        kind: sorted({i.target for i in registry.implementations if i.kind == kind}) for kind in ("operation", "base")
    }
    names = sorted({i.name for i in registry.implementations} | registry.broken.keys())
    for what, given, there in (
        ("implementation", asked.implementations, names),
        ("method", asked.methods, [*methods(), *targets["base"]]),
        ("operation", asked.operations, targets["operation"]),
        ("dtype", asked.dtypes, DTYPES),
    ):
        for name in given:
            if name not in there:
                yours = f"; yours? name it in an entry point of the group {GROUP}, and install it"
                yield f"{what} {name!r}: {near(name, there, 'there are')}{yours if what == 'implementation' else ''}"
