"""Workers of `check`: implementations run in processes of their own, so that a crash or a hang is a finding. No torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NoReturn

from harness.conformance.execution.worker_protocol import (
    CaseBegun,
    CheckEnded,
    Died,
    ModuleMissing,
    Offered,
    PointBegun,
    Target,
    TargetBegun,
    TargetEnded,
    WorkerTask,
    discovery_events,
    worker_events,
)
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.errors import HarnessError
from harness.methods.registry import Implementation, Registry, entry_points_by_name
from harness.process.worker_pool import WorkerPool

PATIENCE = 120.0
"""Seconds without a result after which an implementation counts as hanging. A check takes milliseconds."""


@dataclass
class CheckFindings:
    """Findings of one WorkerTask."""

    tried: list[CheckOutcome] = field(default_factory=list)
    missing: dict[Target, str] = field(default_factory=dict)
    """Target -> the module that it needs and that is not installed."""
    left: list[Target] = field(default_factory=list)
    """Targets that were not run to their end because of an interruption."""

    @property
    def not_tried(self) -> set[Target]:
        """Targets without findings, or without all of them."""
        return {*self.missing, *self.left}


def discover(patience: float = PATIENCE) -> Registry:
    """Import the entry points of the installed distributions in another process: a plug-in may hang or crash on import.

    The functions of the Implementations returned cannot be called.
    """
    pool, points = WorkerPool(), list(entry_points_by_name())
    broken: dict[str, str] = {}
    while True:
        point, died, offered = "", "", None
        for event in discovery_events(pool, points, patience):
            match event:
                case PointBegun(begin=begun):
                    point = begun
                case Offered():
                    point, offered = "", event  # after this no single entry point is to blame
                case Died(died=how):
                    died = how
        if offered is not None:
            there = tuple(Implementation(**fields, function=_not_callable) for fields in offered.offered)
            after = {"one of them": f"after importing them all {died}"} if died else {}
            return Registry(there, offered.broken | broken | after)
        if not point:
            raise HarnessError(f"loading the plug-ins: {died}", hint="its output is above")
        broken[point] = f"importing it: {died}"
        points = [one for one in points if one != point]


def _not_callable(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("this Implementation was loaded in another process")


@dataclass(frozen=True)
class _Run:
    """One run of several tasks."""

    pool: WorkerPool
    progress: Callable[[str], None]
    patience: float

    def task(self, task: WorkerTask, findings: CheckFindings) -> None:
        """Run the targets; after a crash or a hang, those that had not begun in a new process."""
        left = list(task.targets)
        while left and not self.pool.stopped:
            left = self._in_one_process(task, left, findings)

    def _in_one_process(self, task: WorkerTask, targets: list[Target], findings: CheckFindings) -> list[Target]:
        """Run `targets` in one process; return those that did not begin."""
        left, at, case = list(targets), targets[0], "start-up"
        began, before = time.monotonic(), len(findings.tried)
        for event in worker_events(self.pool, task.model_copy(update={"targets": targets}), self.patience):
            match event:
                case TargetBegun(begin=at):
                    case = "start-up"
                    left.remove(at)
                    began, before = time.monotonic(), len(findings.tried)
                    self.progress(f"checking {at[2]} by {at[0]} ...")
                case CaseBegun(case=case):
                    pass
                case ModuleMissing(missing=reason):
                    findings.missing[at] = reason
                case CheckEnded(outcome=outcome):
                    findings.tried.append(outcome)
                case TargetEnded():
                    case = "afterwards"
                    findings.left.remove(at)
                    self.progress(_summary(at, findings.tried[before:], time.monotonic() - began))
                case Died(died=how):
                    findings.tried.append(CheckOutcome.of_whole_target(*at, check="alive", case=case, detail=how))
                    if at in findings.left:
                        findings.left.remove(at)
                    self.progress(f"{at[2]} by {at[0]}: {how}")
                    left = [one for one in left if one != at]  # it may have died before it began: do not retry forever
        return left


def run(
    tasks: Sequence[WorkerTask], jobs: int, progress: Callable[[str], None], patience: float = PATIENCE
) -> tuple[list[CheckFindings], bool]:
    """Run all tasks, `jobs` processes at a time; return their findings, in order, and whether Ctrl-C interrupted.

    progress: called with a line when a target begins and when it ends. patience: see PATIENCE.
    """
    workers = _Run(WorkerPool(), progress, patience)
    findings = [CheckFindings(left=list(task.targets)) for task in tasks]
    interrupted = False
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as threads:
        try:
            for future in [threads.submit(workers.task, task, one) for task, one in zip(tasks, findings, strict=True)]:
                future.result()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if interrupted:
                workers.pool.stop()
            threads.shutdown(cancel_futures=interrupted)
    return findings, interrupted


def _summary(at: Target, tried: Sequence[CheckOutcome], seconds: float) -> str:
    failed = sum(one.status is CheckStatus.FAIL for one in tried)
    return f"checked {at[2]} by {at[0]}: {len(tried)} checks, {failed} failed, {seconds:.1f} s"
