"""Implementations tried in processes of their own, so that one that crashes or hangs is a finding. No torch."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from harness.conformance.case_selection import FEW, CaseSelection
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.errors import HarnessError
from harness.methods.registry import Implementation, Registry, TargetKind, doors
from harness.process.worker_pool import WorkerPool
from harness.records.record import CheckResult, Outcome

PATIENCE = 120.0
"""Seconds without a single result after which an implementation is said to hang. A check takes milliseconds."""

Target = tuple[str, TargetKind, str]
"""An implementation's name, and the kind and name of what it claims to be."""


@dataclass(frozen=True)
class WorkerTask:
    """An entry point, and what to try of what it offers: in one process, which pays for its imports once."""

    point: str
    targets: Sequence[Target]
    breadth: CaseSelection = FEW
    dtypes: tuple[str, ...] = ()


@dataclass
class CheckFindings:
    """What came of a Task. missing: target -> what it needs that is not there. left: what an interruption left untried."""

    tried: list[CheckOutcome] = field(default_factory=list)
    missing: dict[Target, str] = field(default_factory=dict)
    left: list[Target] = field(default_factory=list)

    @property
    def out(self) -> set[Target]:
        """What was not tried."""
        return {*self.missing, *self.left}


def discover(patience: float = PATIENCE) -> Registry:
    """Ask the installed distributions what they offer, in another process: a plug-in may hang or crash on import.

    The functions of the Implementations returned are not there and cannot be called.
    """
    children, points = WorkerPool(), list(doors())
    broken: dict[str, str] = {}
    while True:
        at, died, registry = "", "", None
        for event in children.events("harness.conformance.execution.discovery_worker", {"points": points}, patience):
            at = event.get("begin", at)
            died = event.get("died", "")
            if "offered" in event:
                at = ""  # whatever happens now cannot be laid at one door
                registry = Registry(
                    tuple(Implementation(**i, function=_elsewhere) for i in event["offered"]), event["broken"]
                )
        if registry is not None:
            after = {"one of them": f"after importing them all {died}"} if died else {}
            return Registry(registry.implementations, registry.broken | broken | after)
        if not at:
            raise HarnessError(f"asking the plug-ins what they offer: {died}", hint="what it said is above")
        broken[at] = f"importing it: {died}"
        points = [point for point in points if point != at]


def _elsewhere(*_: Any, **__: Any) -> Any:
    raise RuntimeError("this Implementation was loaded in another process")


def run(
    tasks: Sequence[WorkerTask], jobs: int, said: Callable[[str], None], patience: float = PATIENCE
) -> tuple[list[CheckFindings], bool]:
    """Try all tasks, `jobs` processes at a time; return what was found, in the tasks' order, and whether Ctrl-C came."""
    children = WorkerPool()
    found = [CheckFindings(left=list(task.targets)) for task in tasks]
    interrupted = False
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        try:
            for future in [
                pool.submit(_all_of, task, one, children, said, patience)
                for task, one in zip(tasks, found, strict=True)
            ]:
                future.result()
        except KeyboardInterrupt:
            interrupted = True
        finally:
            if interrupted:
                children.stop()
            pool.shutdown(cancel_futures=interrupted)
    return found, interrupted


def _all_of(
    task: WorkerTask, found: CheckFindings, children: WorkerPool, said: Callable[[str], None], patience: float
) -> None:
    """Try the targets; after a crash or a hang, those that were not yet begun in a new process."""
    left = list(task.targets)
    while left and not children.stopped:
        left = _one_process(task, left, found, children, said, patience)


def _one_process(
    task: WorkerTask,
    targets: list[Target],
    found: CheckFindings,
    children: WorkerPool,
    said: Callable[[str], None],
    patience: float,
) -> list[Target]:
    """Try `targets` in one process; return those that it did not come to."""
    words = {
        "point": task.point, "targets": targets, "breadth": asdict(task.breadth), "dtypes": list(task.dtypes),
    }  # fmt: skip
    left, at, case = list(targets), targets[0], "start-up"
    began, before = time.monotonic(), len(found.tried)
    for event in children.events("harness.conformance.execution.worker", words, patience):
        if "begin" in event:
            name, kind, target = event["begin"]
            at, case = (name, kind, target), "start-up"
            left.remove(at)
            began, before = time.monotonic(), len(found.tried)
            said(f"checking {target} by {name} ...")
        elif "case" in event:
            case = event["case"]
        elif "missing" in event:
            found.missing[at] = event["missing"]
        elif "tried" in event:
            found.tried.append(CheckOutcome.model_validate_json(json.dumps(event["tried"])))
        elif "end" in event:
            case = "afterwards"
            found.left.remove(at)
            said(_summary(at, found.tried[before:], time.monotonic() - began))
        elif "died" in event:
            found.tried.append(_died(at, case, event["died"]))
            if at in found.left:
                found.left.remove(at)
            said(f"{at[2]} by {at[0]}: {event['died']}")
            left = [target for target in left if target != at]  # it may have died before it began: do not try for ever
    return left


def _summary(at: Target, tried: Sequence[CheckOutcome], seconds: float) -> str:
    failed = sum(one.standing is CheckStatus.FAIL for one in tried)
    return f"checked {at[2]} by {at[0]}: {len(tried)} checks, {failed} failed, {seconds:.1f} s"


def _died(at: Target, case: str, how: str) -> CheckOutcome:
    result = CheckResult(check=f"{at[2]}/alive/-/-", outcome=Outcome.FAIL, detail=how)
    return CheckOutcome(
        implementation=at[0], kind=at[1], target=at[2], dtype="-", case=case, result=result
    )  # fmt: skip
