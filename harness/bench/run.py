"""Run benchmarks one after the other, each in its own process, and print and write the results. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.bench import files, planning, pytest_benchmark, table
from harness.bench.planning import BenchRequest, BenchTask
from harness.bench.results import INTERRUPTED, NO_GPU, BenchRow
from harness.conformance.execution import worker_processes
from harness.errors import Exit, UsageError
from harness.process.termination import handle_termination
from harness.process.worker_pool import WorkerPool
from harness.records.environment import describe, gpus
from harness.records.environment import threads as usable
from harness.records.record import Environment

PATIENCE_S = 900.0
"""Without a word for so long, a benchmark hangs. The reference takes minutes of CPU at the largest sizes."""


@dataclass
class BenchReport:
    """What came of it. broken: plug-ins that could not be loaded, and why."""

    environment: Environment
    rows: list[BenchRow] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def exit(self) -> Exit:
        """Interrupted is 4; a check that failed is 1; a process that failed is 4; nothing measured is 5.

        Or 4, where only a GPU was asked for and there is none.
        """
        if self.interrupted:
            return Exit.INFRASTRUCTURE
        if any(row.red for row in self.rows):
            return Exit.FAIL
        if any(row.outcome == "failed" for row in self.rows):
            return Exit.INFRASTRUCTURE
        if any(row.outcome == "measured" for row in self.rows):
            return Exit.PASS
        without = any(row.because.startswith(NO_GPU) for row in self.rows)
        elsewhere = any(row.device != "cuda" for row in self.rows)
        return Exit.INFRASTRUCTURE if without and not elsewhere else Exit.NOTHING_COMPARED

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "schema": files.SCHEMA, "exit": int(self.exit), "interrupted": self.interrupted,
            "environment": self.environment.model_dump(mode="json"), "broken": self.broken,
            "benchmarks": [row.document() for row in self.rows],
        }  # fmt: skip


def bench(asked: BenchRequest, as_json: bool, out: Path | None = None, export: Path | None = None) -> Exit:
    """Benchmark, print, write the files asked for, return the exit code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError(
            "Triton's interpreter is on, and its speed is nobody's", where="TRITON_INTERPRET", hint="unset it"
        )
    files.refuse(out, export)
    threads = usable()
    report = BenchReport(describe(threads))
    folder = files.Folder(out, report.environment)
    with handle_termination():
        measure(asked, threads, report, folder.keep)
    # What was found is printed and written whatever becomes of the other: a full disk, a reader of stdout that has left.
    with contextlib.ExitStack() as afterwards:
        if export is not None:
            document = pytest_benchmark.document(report.rows, report.environment)
            afterwards.callback(files.write, export, document)
        afterwards.callback(folder.finish)
        print(json.dumps(report.document(), indent=1) if as_json else table.as_text(report.rows))
    return report.exit


def measure(asked: BenchRequest, threads: int, report: BenchReport, keep: Callable[[BenchRow], None]) -> None:
    """Put the rows of what was asked for into `report`, each as it comes; after Ctrl-C, rows that say what is missing.

    keep: is given each row too. Raises UsageError for unknown names.
    """

    def add(row: BenchRow) -> None:
        report.rows.append(row)
        keep(row)

    registry = worker_processes.discover()
    report.broken = registry.broken
    for name, why in registry.broken.items():
        print(f"plug-in {name} could not be loaded: {why}", file=sys.stderr)
    tasks, later = planning.plan(asked, registry, no_gpu() if asked.device != "cpu" else NO_GPU)
    children, left, done = WorkerPool(), list(tasks), 0
    try:
        with _threads(threads):
            while left:
                task, done = left[0], 0
                which = f"[{len(tasks) - len(left) + 1}/{len(tasks)}]"
                print(f"{which} {task.name} {task.dtype} vs {task.names[-1]} ...", file=sys.stderr)
                for row in _rows(task, asked, threads, children):
                    add(row)
                    done += 1
                del left[0]
    except KeyboardInterrupt:
        children.stop()
        report.interrupted = True
        for task in left:
            after = f" after the {'row' if done == 1 else f'{done} rows'} above" if done and task is left[0] else ""
            add(replace(task, sizes=()).row("not-run", INTERRUPTED + after))
    for row in later:
        add(row)


def no_gpu() -> str:
    """Say why nothing can run on a GPU, or nothing if something can.

    Torch has the last word, in another process: it may be built without CUDA where the driver shows a GPU.
    """
    if not gpus():
        return NO_GPU
    first, *_ = WorkerPool().events("harness.bench.gpu_probe", {}, PATIENCE_S)
    why = first.get("unusable", first.get("died"))
    return f"{NO_GPU}: nvidia-smi shows one, but {why}" if why else ""


def _rows(task: BenchTask, asked: BenchRequest, threads: int, children: WorkerPool) -> Iterator[BenchRow]:
    if task.kind == "operation":
        yield from _operation(task, asked, threads, children)
        return
    found: list[BenchRow] = []
    try:
        for kind, row in _events(task, asked, threads, children):
            if kind == "row":
                found.append(row)
        found = [_with_memory(row, task, asked, threads, children) for row in found]
    finally:  # a Ctrl-C while memory is taken does not lose the times
        yield from found


def _operation(task: BenchTask, asked: BenchRequest, threads: int, children: WorkerPool) -> Iterator[BenchRow]:
    """Yield the rows of every size; those that come after one which brought its process down, in another process."""
    left = task.sizes
    while left and not children.stopped:
        at = 0
        for kind, found in _events(replace(task, sizes=left), asked, threads, children):
            if kind == "begin":
                at = found
            else:
                yield found
                if found.outcome == "not-run" and found.shape == "-":
                    return
                if found.outcome == "failed":
                    break
        else:
            return
        left = left[at + 1 :]


def _events(task: BenchTask, asked: BenchRequest, threads: int, children: WorkerPool) -> Iterator[tuple[str, Any]]:
    """Yield (`begin`, number), (`row`, Row) and (`memory`, bytes) of one process; its end, if it is bad, is a row."""
    at, last, ended = 0, "", -1
    for event in children.events("harness.bench.worker", task.words(asked, threads), PATIENCE_S):
        if "begin" in event:
            at = event["begin"]
            yield "begin", at
        elif "end" in event:
            ended = event["end"]
        elif "row" in event:
            yield "row", BenchRow.model_validate_json(json.dumps(event["row"]))
        elif "memory" in event:
            yield "memory", event["memory"]
        elif "missing" in event:
            yield "row", replace(task, sizes=()).row("not-run", event["missing"])
        elif "failed" in event:
            last = event["failed"]
        elif "died" in event and ended == max(
            len(task.sizes) - 1, 0
        ):  # all was told before; how it ends changes nothing
            print(f"{task.name}: after its last benchmark {event['died']}", file=sys.stderr)
        elif "died" in event:
            yield "row", task.row("failed", last or event["died"], at)


def _with_memory(row: BenchRow, task: BenchTask, asked: BenchRequest, threads: int, children: WorkerPool) -> BenchRow:
    """Add the memory that the step takes by each of the two, alone in a process."""
    if row.samples is None:
        return row
    found: dict[str, dict[str, int]] = {}
    for index, name in enumerate(task.names):
        for kind, value in _events(task.alone(index), asked, threads, children):
            if kind == "memory":
                found[name] = value
            elif kind == "row":
                because = f"timed, but the memory of {name}: {value.because}"
                return row.model_copy(update={"outcome": "failed", "because": because})
    return row.model_copy(update={"memory": found})


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Let children use all cores, in libraries' own OpenMP too: torch.set_num_threads reaches torch's copy of it alone."""
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = str(count)
    try:
        yield
    finally:
        if before is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = before
