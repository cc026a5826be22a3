"""Implementations tried in processes of their own, so that one that crashes or hangs is a finding. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from harness.conformance.tried import Tried
from harness.records import CheckResult, Outcome
from harness.registry import Kind

SILENCE = 120.0
"""Seconds without a single result after which an implementation is said to hang. A check takes milliseconds."""

Target = tuple[Kind, str]


@dataclass(frozen=True)
class Task:
    """One implementation and what to try of it, as (kind, target)."""

    implementation: str
    targets: Sequence[Target]
    full: bool = False
    dtypes: tuple[str, ...] = ()


@dataclass
class Findings:
    """What came of a Task. missing: target -> what it needs that is not there."""

    tried: list[Tried] = field(default_factory=list)
    missing: dict[Target, str] = field(default_factory=dict)


def run(tasks: Sequence[Task], jobs: int, said: Callable[[str], None], silence: float = SILENCE) -> list[Findings]:
    """Try all tasks, `jobs` processes at a time, in the tasks' order."""
    with ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:
        return list(pool.map(lambda task: _all_of(task, said, silence), tasks))


def _all_of(task: Task, said: Callable[[str], None], silence: float) -> Findings:
    """Try the targets; after a crash or a hang, those that were not yet begun in a new process."""
    found, left = Findings(), list(task.targets)
    while left:
        left = _one_process(task, left, found, said, silence)
    return found


def _one_process(
    task: Task, targets: list[Target], found: Findings, said: Callable[[str], None], silence: float
) -> list[Target]:
    """Try `targets` in one process; return those that it did not come to."""
    reading, writing = os.pipe()
    words = {
        "implementation": task.implementation, "targets": targets, "full": task.full, "dtypes": list(task.dtypes),
    }  # fmt: skip
    # The tensors are tiny, and threads that wait for each other would slow down whatever runs beside this.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        [sys.executable, "-m", "harness.conformance.worker", str(writing), json.dumps(words)],
        pass_fds=(writing,), stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
    )  # fmt: skip
    os.close(writing)
    left = list(targets)
    at: Target | None = None
    case, wrong = "", ""
    try:
        for event in _events(reading, silence):
            if event is None:
                wrong = f"no result for {silence:.0f} s; killed"
                break
            if "begin" in event:
                at, case = (event["begin"][0], event["begin"][1]), ""
                left.remove(at)
                said(f"checking {at[1]} by {task.implementation} ...")
            elif "case" in event:
                case = event["case"]
            elif "missing" in event and at is not None:
                found.missing[at] = event["missing"]
            elif "tried" in event:
                found.tried.append(Tried.model_validate_json(json.dumps(event["tried"])))
            elif "end" in event:
                at = None
    finally:
        os.close(reading)
        _kill(process)
    if at is None and process.returncode != 0 and left:
        at = left.pop(0)  # it died before it began: do not try for ever
    if at is not None:
        found.tried.append(_died(task, at, case, wrong or _how(process.returncode)))
    return left


def _events(reading: int, silence: float) -> Any:
    """Yield the worker's events; None once it was silent for too long."""
    buffer = b""
    while True:
        if not select.select([reading], [], [], silence)[0]:
            yield None
            return
        chunk = os.read(reading, 1 << 16)
        if not chunk:
            return
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            yield json.loads(line)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End the worker with all its children; one that has closed its end of the pipe is given a moment to go by itself."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=5 if process.poll() is None else 0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _how(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"the process died of {signal.Signals(-code).name}"
    return f"the process ended with exit code {code} before it was done; what it said is on stderr"


def _died(task: Task, at: Target, case: str, how: str) -> Tried:
    target = at[1]
    result = CheckResult(check=f"{target}/alive/-/-", outcome=Outcome.FAIL, detail=how)
    return Tried(
        implementation=task.implementation, kind=at[0], target=target,
        dtype="-", case=case or "start-up", result=result,
    )  # fmt: skip
