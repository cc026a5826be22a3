"""Run checks in worker processes, without importing torch in this process.

If an implementation crashes or hangs, only its worker ends, and the crash is reported as its failure.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
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
from harness.methods.registry import Implementation, Registry
from harness.process.worker_pool import WorkerPool
from harness.records import environment

PATIENCE = 120.0
"""Seconds without a result after which an implementation counts as hanging. A check normally takes milliseconds."""
_PRELOADED = "harness.conformance.execution.preload"
"""Module that imports what every worker needs."""
_PRELOADED_FOR_MANY = "harness.conformance.execution.preload_all"
"""Module that also imports what most workers need at some time."""


@dataclass
class CheckFindings:
    """Findings of one WorkerTask."""

    tried: list[CheckOutcome] = field(default_factory=list)
    missing: dict[Target, str] = field(default_factory=dict)
    """Target -> reason why the target cannot run here. The reason names a module that is not installed."""
    cut_short: list[Target] = field(default_factory=list)
    """Targets whose process died before their last check."""
    left: list[Target] = field(default_factory=list)
    """Targets that have not ended, because the run was interrupted."""

    @property
    def not_tried(self) -> set[Target]:
        """The targets that were not fully tried: those in `missing`, `cut_short` or `left`."""
        return {*self.missing, *self.cut_short, *self.left}


def discover(patience: float = PATIENCE, python: Path | None = None) -> Registry:
    """Return the Registry of the installed distributions. Its Implementations cannot be called in this process.

    A new process imports the entry points, because a plug-in may hang or crash on import. Raises HarnessError if the
    new process dies before it begins to import an entry point. python: interpreter of the new process; by default, the
    interpreter of the caller.
    """
    pool = WorkerPool(python)
    broken: dict[str, str] = {}
    while True:
        point, died, offered = "", "", None
        for event in discovery_events(pool, list(broken), patience):
            match event:
                case PointBegun(begin=begun):
                    point = begun
                case Offered():
                    point, offered = "", event  # all are imported: no single entry point causes a later crash
                case Died(died=how):
                    died = how
        if offered is not None:
            implementations = tuple(Implementation(**fields, function=_not_callable) for fields in offered.offered)
            after = {"one of them": f"after importing them all {died}"} if died else {}
            return Registry(implementations, offered.broken | broken | after, offered.environment)
        if not point:
            raise HarnessError(f"loading the plug-ins: {died}", hint="read the output of the plug-in process above")
        broken[point] = f"importing it: {died}"


def _not_callable(*_: object, **__: object) -> NoReturn:
    raise RuntimeError("this Implementation was loaded in another process")


@dataclass(frozen=True)
class _Run:
    """Runs several worker tasks in a pool of processes."""

    pool: WorkerPool
    progress: Callable[[str], None]
    patience: float

    def task(self, task: WorkerTask, findings: CheckFindings) -> None:
        """Run the targets of a task, and add what is found to `findings`.

        After a crash or a hang, a new process runs the targets that had not begun.
        """
        remaining = list(task.targets)
        while remaining and not self.pool.stopped:
            remaining = self._run_in_one_process(task, remaining, findings)

    def _run_in_one_process(self, task: WorkerTask, targets: list[Target], findings: CheckFindings) -> list[Target]:
        """Run `targets` in one process, and return the targets that did not start."""
        remaining, current, case = list(targets), targets[0], "start-up"
        began, before = time.monotonic(), len(findings.tried)
        for event in worker_events(self.pool, task.model_copy(update={"targets": targets}), self.patience):
            match event:
                case TargetBegun(begin=current):
                    case = "start-up"
                    remaining.remove(current)
                    began, before = time.monotonic(), len(findings.tried)
                    self.progress(f"checking {current[2]} by {current[0]} ...")
                case CaseBegun(case=case):
                    pass
                case ModuleMissing(missing=reason):
                    findings.missing[current] = reason
                case CheckEnded(outcome=outcome):
                    findings.tried.append(outcome)
                case TargetEnded():
                    case = "afterwards"
                    findings.left.remove(current)
                    self.progress(_summary(current, findings.tried[before:], time.monotonic() - began))
                case Died(died=how):
                    failure = CheckOutcome.of_whole_target(*current, check="alive", case=case, detail=how)
                    findings.tried.append(failure)
                    if current in findings.left:
                        findings.left.remove(current)
                        findings.cut_short.append(current)
                    self.progress(f"{current[2]} by {current[0]}: {how}")
                    # A target that kills the process before it begins must not be retried forever.
                    remaining = [one for one in remaining if one != current]
        return remaining


def worker_pool(device: str, python: Path | None = None, *, few: bool = False) -> WorkerPool:
    """Return a pool for the workers of `run`, whose tensors are on `device`.

    If the workers are forks, the process that forks them starts now, and imports modules that the workers need. The
    libraries under test are not among these modules: each worker imports them itself, and reports what their import
    changes. python: interpreter of the workers; by default, that of the caller. few: True if there are at most as many
    tasks as workers at a time. The process then imports only what every worker needs, so that the first one starts sooner.
    """
    pool = WorkerPool(python, ((_PRELOADED if few else _PRELOADED_FOR_MANY),) if forks(device) else ())
    pool.start_server()
    return pool


def run(
    tasks: Sequence[WorkerTask],
    pool: WorkerPool,
    jobs: int,
    progress: Callable[[str], None],
    patience: float = PATIENCE,
) -> tuple[list[CheckFindings], bool]:
    """Run all tasks in at most `jobs` processes of the pool at a time.

    Return the findings of each task, in the order of the tasks, and whether Ctrl-C interrupted the run. progress:
    called with a line of text when a target begins and when it ends. patience: seconds without a result after which
    an implementation counts as hanging.
    """
    findings = [CheckFindings(left=list(task.targets)) for task in tasks]
    interrupted = False
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as threads:
        workers = _Run(pool, progress, patience)
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


def forks(device: str) -> bool:
    """Return whether the workers of several tasks on this device are forks, which start in milliseconds."""
    # If there is a GPU, a library may use it during its import, and no fork could use it afterwards.
    return sys.platform == "linux" and device == "cpu" and not environment.gpus()


def _summary(target: Target, tried: Sequence[CheckOutcome], seconds: float) -> str:
    failed = sum(one.status is CheckStatus.FAIL for one in tried)
    passed = sum(one.status is CheckStatus.PASS for one in tried)
    # Known defects are told apart at the end, when all outcomes are there.
    failures = f"{failed} failed, known defects included" if failed else "0 failed"
    return f"checked {target[2]} by {target[0]}: {passed} passed, {failures}, {seconds:.1f} s"
