"""The verb `check`: implementations against their references, as a matrix. No torch: the work is done in other processes."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.conformance import defects, isolated, show
from harness.conformance.suite import path_of
from harness.conformance.tried import Standing, Tried
from harness.errors import Exit, UsageError
from harness.methods import methods
from harness.registry import Implementation, Registry, discover
from harness.spelling import near

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Asked:
    """What to check: everything, if nothing is named. full: the whole product of every suite instead of its diagonal."""

    implementations: Sequence[str] = ()
    methods: Sequence[str] = ()
    operations: Sequence[str] = ()
    dtypes: Sequence[str] = ()
    full: bool = False
    jobs: int | None = None


@dataclass(frozen=True)
class Report:
    """What came of it.

    skipped: what was not tried, and why. complaints: known defects that did not show. broken: plug-ins that could not be
    loaded.
    """

    tried: list[Tried]
    skipped: dict[str, str] = field(default_factory=dict)
    complaints: list[str] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)

    def count(self, standing: Standing) -> int:
        """Count the results of one standing."""
        return sum(one.standing is standing for one in self.tried)

    @property
    def exit(self) -> Exit:
        """A failure, a broken plug-in or a defect that did not show is 1; nothing tried is 5."""
        if self.count(Standing.FAIL) or self.complaints or self.broken:
            return Exit.FAIL
        return Exit.PASS if self.count(Standing.PASS) else Exit.NOTHING_COMPARED

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        rows = [{**one.model_dump(mode="json"), "standing": one.standing.value} for one in self.tried]
        return {
            "schema": 2, "checks": rows, "skipped": self.skipped, "complaints": self.complaints, "broken": self.broken,
        }  # fmt: skip


def check(asked: Asked, as_json: bool) -> Exit:
    """Check, print, return the exit code."""
    report = judge(asked)
    if as_json:
        print(json.dumps(report.document(), indent=1))
    else:
        show.print_matrix(report)
    return report.exit


def judge(asked: Asked) -> Report:
    """Try what was asked for, each implementation in a process of its own. Raises UsageError for unknown names."""
    registry = discover()
    _known_names(asked, registry)
    known = defects.known()
    wanted = [i for i in registry.implementations if _asked_for(i, asked)]
    tasks, skipped = _tasks(wanted, asked)
    jobs = asked.jobs or min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
    findings = isolated.run(tasks, jobs, lambda line: print(line, file=sys.stderr))
    tried = [one for found in findings for one in found.tried]
    for task, found in zip(tasks, findings, strict=True):
        skipped |= {f"{task.implementation} {target}": why for (_, target), why in found.missing.items()}
    marked, complaints = defects.explained(tried, known)
    broken = {n: w for n, w in registry.broken.items() if not asked.implementations or n in asked.implementations}
    return Report(marked, skipped, complaints, broken)


def _asked_for(implementation: Implementation, asked: Asked) -> bool:
    if asked.implementations and implementation.name not in asked.implementations:
        return False
    if not asked.methods and not asked.operations:
        return True
    return implementation.target in (asked.operations if implementation.kind == "operation" else asked.methods)


def _tasks(wanted: Sequence[Implementation], asked: Asked) -> tuple[list[isolated.Task], dict[str, str]]:
    """Group by implementation, since each process pays for its imports once."""
    targets: dict[str, list[isolated.Target]] = {}
    skipped = {}
    for one in wanted:
        if path_of(one.target).is_file():
            targets.setdefault(one.name, []).append((one.kind, one.target))
        else:
            skipped[f"{one.name} {one.target}"] = f"there is no parity suite {path_of(one.target).name}"
    return [isolated.Task(n, several, asked.full, tuple(asked.dtypes)) for n, several in targets.items()], skipped


def _known_names(asked: Asked, registry: Registry) -> None:
    """Raise one UsageError that names every name nobody knows."""
    operations = sorted({i.target for i in registry.implementations if i.kind == "operation"})
    bases = sorted({i.target for i in registry.implementations if i.kind == "base"})
    names = sorted({i.name for i in registry.implementations} | registry.broken.keys())
    odd = [
        f"{what} {name!r}: {near(name, there, 'there are')}"
        for what, given, there in (
            ("implementation", asked.implementations, names),
            ("method", asked.methods, [*methods(), *bases]),
            ("operation", asked.operations, operations),
            ("dtype", asked.dtypes, DTYPES),
        )
        for name in given
        if name not in there
    ]
    if odd:
        raise UsageError("unknown " + "; unknown ".join(odd), mend="`peft-harness list implementations` shows them all")
