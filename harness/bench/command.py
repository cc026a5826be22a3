"""The verb `bench`: tasks run one after the other, each in a process of its own; rows printed and written. No torch."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from harness.bench import planning, pytest_benchmark, table
from harness.bench.planning import Asked, Task
from harness.bench.results import Row
from harness.conformance import isolated
from harness.conformance.children import Children
from harness.errors import Exit, UsageError
from harness.measure.environment import describe, gpus, physical_cores
from harness.records import Environment
from harness.runner.stop import on_request

SCHEMA = 1
PATIENCE_S = 900.0
"""Without a word for so long, a benchmark hangs. The reference takes minutes of CPU at the largest sizes."""


@dataclass
class Report:
    """What came of it. broken: plug-ins that could not be loaded, and why."""

    environment: Environment
    rows: list[Row] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def exit(self) -> Exit:
        """Interrupted is 4; a check that failed is 1; a process that failed is 4; nothing measured is 5, or 4 for no GPU."""
        if self.interrupted:
            return Exit.INFRASTRUCTURE
        if any(row.red for row in self.rows):
            return Exit.FAIL
        if any(row.outcome == "failed" for row in self.rows):
            return Exit.INFRASTRUCTURE
        if any(row.outcome == "measured" for row in self.rows):
            return Exit.PASS
        without = [row for row in self.rows if row.because == "no GPU"]
        return Exit.INFRASTRUCTURE if without and len(without) == len(self.rows) else Exit.NOTHING_COMPARED

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it."""
        return {
            "schema": SCHEMA, "exit": int(self.exit), "interrupted": self.interrupted,
            "environment": self.environment.model_dump(mode="json"), "broken": self.broken,
            "benchmarks": [row.document() for row in self.rows],
        }  # fmt: skip


def bench(asked: Asked, as_json: bool, out: Path | None = None, export: Path | None = None) -> Exit:
    """Benchmark, print, write the files asked for, return the exit code."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError(
            "Triton's interpreter is on, and its speed is nobody's", where="TRITON_INTERPRET", mend="unset it"
        )
    if export is not None and not export.absolute().parent.is_dir():
        raise UsageError(f"there is no folder {export.parent}", where="--export-pytest-benchmark", mend="make it first")
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"cannot make {out}: {error.strerror}", where="--out", mend="name another folder"
            ) from error
    with on_request():
        report = measure(asked)
    if out is not None:
        for number, row in enumerate(report.rows):
            whole = {"schema": SCHEMA, "environment": report.environment.model_dump(mode="json"), **row.document()}
            _write(out / f"{number:03d}-{_slug(row)}.json", whole)
    if export is not None:
        _write(export, pytest_benchmark.document(report.rows, report.environment))
    print(json.dumps(report.document(), indent=1) if as_json else table.as_text(report.rows))
    return report.exit


def measure(asked: Asked) -> Report:
    """Run what was asked for. Raises UsageError for unknown names."""
    threads = physical_cores()
    report = Report(describe(threads))
    registry = isolated.discover()
    report.broken = registry.broken
    for name, why in registry.broken.items():
        print(f"plug-in {name} could not be loaded: {why}", file=sys.stderr)
    tasks, later = planning.plan(asked, registry, bool(gpus()))
    children = Children()
    try:
        with _threads(threads):
            for number, task in enumerate(tasks, start=1):
                print(f"[{number}/{len(tasks)}] {task.name} {task.dtype} vs {task.names[-1]} ...", file=sys.stderr)
                report.rows += _rows(task, asked, threads, children)
    except KeyboardInterrupt:
        children.stop()
        report.interrupted = True
    report.rows += later
    return report


def _rows(task: Task, asked: Asked, threads: int, children: Children) -> list[Row]:
    if task.kind == "operation":
        return list(_operation(task, asked, threads, children))
    rows = [row for kind, row in _events(task, asked, threads, children) if kind == "row"]
    return [_with_memory(row, task, asked, threads, children) for row in rows]


def _operation(task: Task, asked: Asked, threads: int, children: Children) -> Iterator[Row]:
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


def _events(task: Task, asked: Asked, threads: int, children: Children) -> Iterator[tuple[str, Any]]:
    """Yield (`begin`, number), (`row`, Row) and (`memory`, bytes) of one process; its end, if it is bad, is a row."""
    at, last, ended = 0, "", -1
    for event in children.events("harness.bench.worker", task.words(asked, threads), PATIENCE_S):
        if "begin" in event:
            at = event["begin"]
            yield "begin", at
        elif "end" in event:
            ended = event["end"]
        elif "row" in event:
            yield "row", Row.model_validate_json(json.dumps(event["row"]))
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


def _with_memory(row: Row, task: Task, asked: Asked, threads: int, children: Children) -> Row:
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


@contextmanager
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


def _slug(row: Row) -> str:
    words: Sequence[str] = (row.name, row.shape, row.dtype, row.device, "vs", row.other)
    return re.sub(r"[^\w.+]+", "-", "-".join(words)).strip("-")


def _write(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, allow_nan=False)
    unfinished = path.with_name(f"{path.name}.unfinished")
    try:
        unfinished.write_text(text + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}", mend="name another place") from error
