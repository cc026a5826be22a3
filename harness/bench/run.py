"""Run benchmarks one after the other, each in its own process. Print and write the results. Imports no torch."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from time import monotonic
from typing import Any

from harness.assets.environments import homes
from harness.assets.environments.folder import MadeEnvironment
from harness.bench import files, planning, pytest_benchmark, table
from harness.bench.gpu import NO_GPU, no_gpu, refuse_interpreter
from harness.bench.planning import BenchRequest, BenchTask
from harness.bench.results import BenchRow
from harness.bench.verdict import with_own_clock
from harness.conformance.execution import worker_processes
from harness.console import print_json, print_lines, print_note
from harness.errors import Exit, HarnessError
from harness.process.signals import handle_termination
from harness.process.worker_pool import WorkerPool
from harness.records.environment import describe
from harness.records.environment import threads as usable
from harness.records.record import Environment


@dataclass
class BenchReport:
    """The result of one `bench` command: a row for each benchmark, and facts about the machine."""

    environment: Environment
    rows: list[BenchRow] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    """Name of each plug-in that could not be loaded -> the reason."""
    interrupted: bool = False

    @property
    def exit(self) -> Exit:
        """The exit code of the command.

        The first condition that holds decides:

        - 4 if the command was interrupted;
        - 1 if a check failed and no known defect explains the failure;
        - 4 if a worker failed;
        - 0 if anything was measured;
        - 4 if the user requested only a GPU and the machine has none;
        - 5 in any other case.
        """
        if self.interrupted:
            return Exit.INFRASTRUCTURE
        if any(row.has_unexplained_failure for row in self.rows):
            return Exit.FAIL
        if any(row.outcome == "failed" for row in self.rows):
            return Exit.INFRASTRUCTURE
        if any(row.outcome == "measured" for row in self.rows):
            return Exit.PASS
        return Exit.INFRASTRUCTURE if self.lacking else Exit.NOTHING_COMPARED

    @property
    def lacking(self) -> str:
        """Reason why there is no GPU, if the user requested only a GPU. Otherwise an empty string."""
        reasons = [row.because for row in self.rows if row.cause == "no-gpu"]
        return reasons[0] if reasons and all(row.device == "cuda" for row in self.rows) else ""

    def document(self) -> dict[str, Any]:
        """Return the document that `--json` prints."""
        return {
            "schema": files.SCHEMA, "exit": int(self.exit), "interrupted": self.interrupted,
            "environment": self.environment.model_dump(mode="json"), "broken": self.broken,
            "benchmarks": [row.document() for row in self.rows],
        }  # fmt: skip


def bench(request: BenchRequest, as_json: bool, out: Path | None = None, export: Path | None = None) -> Exit:
    """Run the benchmarks, print the table, write the requested files, and return the exit code.

    as_json: print JSON instead of the table. out: folder for one file per row. export: file in the format of
    pytest-benchmark. Raises UsageError for an unusable request, and under Triton's interpreter. Raises StoreError if a
    file cannot be written, and HarnessError if only a GPU was requested and there is none.
    """
    refuse_interpreter()
    files.check_writable(out, export)
    threads = usable()
    report = BenchReport(describe(threads))
    folder = files.Folder(out, report.environment)
    with handle_termination():
        measure(request, threads, report, folder.save)
    # Print and write independently: either may fail, by a full disk or a closed stdout.
    with contextlib.ExitStack() as afterwards:
        if export is not None:
            document = pytest_benchmark.document(report.rows, report.environment)
            afterwards.callback(files.write, export, document)
        afterwards.callback(folder.finish)
        if as_json:
            print_json(report.document())
        elif not report.lacking:
            print_lines(table.lines(report.rows))
        if report.lacking:
            hint = "`peft-harness doctor` shows driver and torch; without --device, the benchmarks run on the CPU"
            raise HarnessError(f"{report.lacking}, so nothing was measured", where="--device cuda", hint=hint)
    return report.exit


def measure(request: BenchRequest, threads: int, report: BenchReport, save: Callable[[BenchRow], None]) -> None:
    """Run the benchmarks. As soon as a row is measured, add it to `report` and pass it to `save`.

    After Ctrl-C, each unfinished task gets a row that says so. At the end, each benchmark that cannot run gets a row
    with the reason. Raises UsageError for unknown names.
    """

    def add(row: BenchRow) -> None:
        report.rows.append(row)
        save(row)

    registry = worker_processes.discover()
    report.broken = registry.broken
    for name, why in registry.broken.items():
        print_note(f"plug-in {name} could not be loaded: {why}")
    tasks, not_run = planning.plan(request, registry, no_gpu() if request.device != "cpu" else NO_GPU)
    processes, remaining, done = TaskRunner(request, threads, WorkerPool()), list(tasks), 0
    try:
        while remaining:
            task, done = remaining[0], 0
            progress = f"[{len(tasks) - len(remaining) + 1}/{len(tasks)}]"
            print_note(f"{progress} {task.name} {task.dtype} vs {task.names[-1]} ...")
            for row in processes.rows(task):
                add(row)
                done += 1
            del remaining[0]
    except KeyboardInterrupt:
        processes.stop()
        report.interrupted = True
        after = f" after the {'row' if done == 1 else f'{done} rows'} above" if done else ""
        for number, task in enumerate(remaining):
            because = f"interrupted{after if number == 0 else ''}"
            add(replace(task, sizes=()).row("not-run", because, cause="interrupted"))
    for row in not_run:
        add(row)


@dataclass
class TaskRunner:
    """Runs the tasks of `bench` in worker processes."""

    request: BenchRequest
    threads: int
    workers: WorkerPool
    in_environments: dict[str, WorkerPool] = field(default_factory=dict)
    """Name of an implementation that has its own Python environment -> workers that run in this environment."""

    def stop(self) -> None:
        """Stop all workers."""
        for pool in (self.workers, *self.in_environments.values()):
            pool.stop()

    def rows(self, task: BenchTask) -> Iterator[BenchRow]:
        """Yield the rows of a task. A benchmark that fails also gets a row, which reports the failure."""
        if task.kind == "operation":
            yield from self._operation(task)
            return
        found: list[BenchRow] = []
        try:
            found.extend(row for kind, row in self._events(task) if kind == "row")
            found = [self._with_memory(row, task) for row in found]
        finally:  # Ctrl-C while memory is measured must not lose the times
            yield from found

    def _operation(self, task: BenchTask) -> Iterator[BenchRow]:
        """Yield the rows of an Operation, each as soon as it is measured.

        If the process fails or loses the GPU at one size, a new process continues with the next size.
        """
        remaining = task.sizes
        while remaining and not self._workers(task).stopped:
            at = 0
            for kind, found in self._events(replace(task, sizes=remaining)):
                if kind == "begin":
                    at = found
                    continue
                if kind == "lost":
                    break
                yield found
                if found.outcome == "not-run" and found.shape == "-":
                    return
                if found.outcome == "failed":
                    break
            else:
                return
            remaining = remaining[at + 1 :]

    def _events(self, task: BenchTask) -> Iterator[tuple[str, Any]]:
        """Run a task in a process. Yield (`begin`, number), (`row`, BenchRow) and (`memory`, bytes by name).

        number: position of a size in `task.sizes`. If the process fails, a last row reports the failure. If the GPU no
        longer works and a row with the failed check was already yielded, the last event is (`lost`, reason) instead.
        """
        at, error, lost, complete, timed = 0, "", "", False, dict[str, float]()
        row: BenchRow | None = None
        document = task.document(self.request, self.threads)
        for event in self._workers(task).events("harness.bench.worker", document, self.request.patience):
            if "begin" in event:
                at, row = event["begin"], None
                yield "begin", at
            elif "end" in event:
                complete = event["end"] == max(len(task.sizes) - 1, 0)
            elif "timing" in event:
                timed[event["timing"]] = monotonic()
            elif "row" in event:
                row = BenchRow.model_validate_json(json.dumps(event["row"]))
                begin, end, changed = (timed.pop(name, 0.0) for name in ("begin", "end", "changed"))
                row = with_own_clock(row, (end - begin) - (changed - end))
                yield "row", row
            elif "memory" in event:
                yield "memory", event["memory"]
            elif "missing" in event:
                home = homes.of({task.names[-1]}).get(task.names[-1], "")
                if isinstance(home, MadeEnvironment) and task.names[-1] not in self.in_environments:
                    self.in_environments[task.names[-1]] = WorkerPool(home.python)
                    print_note(f"{task.name}: in the environment {home.label}")
                    yield from self._events(task)
                    return
                makes = f"; `peft-harness env create {home}` makes an environment that has it" if home else ""
                yield "row", replace(task, sizes=()).row("not-run", f"{event['missing']}{makes}")
                complete = True
            elif "failed" in event:
                error = event["failed"]
            elif "lost" in event:
                error = lost = event["lost"]
            elif "died" in event and lost and row is not None and row.has_unexplained_failure:
                yield "lost", lost
            elif "died" in event and complete:  # all rows were reported
                print_note(f"{task.name}: after its last benchmark {event['died']}")
            elif "died" in event:
                yield "row", task.row("failed", error or event["died"], at)

    def _workers(self, task: BenchTask) -> WorkerPool:
        return self.in_environments.get(task.names[-1], self.workers)

    def _with_memory(self, row: BenchRow, task: BenchTask) -> BenchRow:
        """Measure the memory of a training step by each implementation. Return the row with these numbers.

        Each implementation runs in a process of its own. If a process gives no memory, the returned row is `failed`. A
        row without times is returned unchanged.
        """
        if row.samples is None:
            return row
        found: dict[str, dict[str, int]] = {}
        for index, name in enumerate(task.names):
            for kind, value in self._events(task.of_one(index)):
                if kind == "memory":
                    found[name] = value
                elif kind == "row":
                    because = f"timed, but the memory of {name} could not be measured: {value.because}"
                    return row.model_copy(update={"outcome": "failed", "because": because})
        return row.model_copy(update={"memory": found})
