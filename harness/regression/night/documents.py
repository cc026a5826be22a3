"""Convert the JSON that the parts (commands) of a nightly run print to a summary, a table and failures.

Imports no torch.
"""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.analysis.verdict_kind import VerdictKind
from harness.bench import table as bench_table
from harness.bench.card import COLUMNS, fields, rate
from harness.bench.results import BenchRow
from harness.claims.judge import ClaimVerdict
from harness.errors import HarnessError, first_names, plural
from harness.records import store
from harness.records.record import Status
from harness.regression.night.part_run import STDOUT
from harness.regression.night.parts import HEADLINE, NightPart
from harness.regression.night.results import PartFailure, PartTable

_MOST_FAILURES = 60
"""Largest number of failures in the result of a part. The JSON that the part printed has all of them."""

NO_CELL = "no Cell ran"
_FAILED = (Status.ERROR, Status.OOM, Status.TIMEOUT)
_REFUTING_STATUSES = (Status.OOM, Status.TIMEOUT)
"""Statuses that refute a headline claim of a paper. In a run for such a claim, they are a result, not a failure."""
_OURS = ("ours", "how")
"""Keys of a claim in the JSON. `ours`: our value. `how`: how it was computed, on which machine and from which run."""


@dataclass
class PartReading:
    """Results of a part (one command) of a nightly run, as read from its output."""

    summary: str = ""
    table: PartTable | None = None
    failures: list[PartFailure] = field(default_factory=list)
    is_missing: bool = False
    """True if the part left no output that can be read."""
    wrong: str = ""
    """Description of the first wrong result. Empty if there is none."""


def read(part: NightPart, folder: Path, line: str) -> PartReading:
    """Read what a part (one command) of a nightly run has written to `folder`.

    line: the part's command as a person types it. It reproduces each failure that has no shorter command.
    """
    try:
        if part.kind == "run":
            outcomes = _REFUTING_STATUSES if part.name.startswith(HEADLINE) else ()
            return _run(folder / "run", line, part.words[1], outcomes)
        document = _document(folder / STDOUT)
        if document is None and part.kind == "bench":  # the bench was killed: its rows are in files
            document = {"benchmarks": [_document(file) for file in sorted(folder.glob("[0-9]*-vs-*.json"))]}
        if document is not None:
            return _READERS[part.kind](document, line)
    except (KeyError, TypeError, ValueError, HarnessError) as error:  # the other parts must go on
        return PartReading(f"its document cannot be read: {error!r}", is_missing=True)
    return PartReading(is_missing=True)


def _document(file: Path) -> dict[str, Any] | None:
    try:
        found = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _check(document: Mapping[str, Any], line: str) -> PartReading:
    checks = document["checks"]
    counts = Counter(one["standing"] for one in checks)
    by_target: dict[str, Counter[str]] = {}
    for one in checks:
        by_target.setdefault(one["target"], Counter())[one["standing"]] += 1
    words = list(counts)
    rows = [[target, *(str(found[word]) for word in words)] for target, found in by_target.items()]
    failures = [
        PartFailure(
            where=f"{one['target']}: {one['result']['check']} ({one['case']})", what=_what(one["result"]),
            traceback=one.get("traceback", ""), reproduce=_check_command(one, line),
        )
        for one in checks
        if one["standing"] == "fail"
    ]  # fmt: skip
    skipped = f"; {plural(len(document['skipped']), 'target')} not checked" if document["skipped"] else ""
    summary = ", ".join(f"{count} {word}" for word, count in counts.most_common()) + skipped
    wrong = plural(len(failures), "failed check") if failures else ""
    return PartReading(
        summary, PartTable(columns=["target", *words], rows=rows), failures[:_MOST_FAILURES], wrong=wrong
    )


def _what(result: Mapping[str, Any]) -> str:
    numbers = f"error {result['error']}, allowed {result['allowed']}" if result.get("error") is not None else ""
    nan = f"{result['nonfinite']} numbers are not finite" if result.get("nonfinite") else ""
    return "; ".join(filter(None, [str(result.get("detail") or ""), nan, numbers, str(result.get("worst") or "")]))


def _check_command(one: Mapping[str, Any], line: str) -> str:
    option = "--op" if one["kind"] == "operation" else "--method"
    device = " --device cuda" if "--device cuda" in line else ""
    variables = "TRITON_INTERPRET=1 " if line.startswith("TRITON_INTERPRET=1") else ""
    dtype = f" --dtype {one['dtype']}" if one["dtype"] != "-" else ""
    return f"{variables}peft-harness check {one['implementation']} {option} {one['target']}{dtype}{device}"


def _bench(document: Mapping[str, Any], line: str) -> PartReading:
    known = BenchRow.model_fields.keys()
    rows = [
        BenchRow.model_validate_json(json.dumps({key: value for key, value in one.items() if key in known}))
        for one in document["benchmarks"]
        if one is not None
    ]
    counts = Counter(row.outcome for row in rows)
    columns = [
        "benchmark",
        "shape",
        "dtype",
        "ours",
        "other",
        "its time",
        f"other/{rows[0].ours if rows else 'ours'}",  # as in the notes below the table
        "of the ceiling",
        "memory",
        "parity",
    ]
    fields = (_padded(bench_table.fields(row)) for row in rows)
    table = [[f[0], f[1], f[2], f[4], f[5], f[6], f[7], f[8], f[9], f[10]] for f in fields]
    failures = [
        PartFailure(where=f"{row.name} {row.shape} {row.dtype} vs {row.other}", what=row.because, reproduce=line)
        for row in rows
        if row.outcome == "failed" or row.has_unexplained_failure
    ]
    summary = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    if counts.keys() == {"not-run"}:
        summary += f": {first_names(list(dict.fromkeys(row.because for row in rows)))}"
    wrong = next((f"{row.name}: {row.because}" for row in rows if row.has_unexplained_failure), "")
    shown = PartTable(columns=columns, rows=table, notes=bench_table.notes(rows))
    return PartReading(summary, shown, failures[:_MOST_FAILURES], wrong=wrong)


def _padded(fields: tuple[str, ...]) -> list[str]:
    """Return the fields with dashes inserted before the last one (the parity or the reason), so that there are 11."""
    return [*fields[:-1], *["-"] * (11 - len(fields)), fields[-1]]


def _card(document: Mapping[str, Any], line: str) -> PartReading:
    rows = document["rows"]
    failures = []
    if document["failed"]:
        failures = [
            PartFailure(
                where=document["what"], what=document["failed"], traceback=document["traceback"], reproduce=line
            )
        ]
    if document["what"] == "ceilings":
        rates = [[row["name"], rate(row["value"], row["unit"])] for row in rows]
        return PartReading(
            ", ".join(f"{name} {value}" for name, value in rates), PartTable(columns=["", "rate"], rows=rates), failures
        )
    shown = PartTable(columns=COLUMNS, rows=list(map(fields, rows)), notes=document["found"])
    return PartReading(plural(len(rows), "measurement"), shown, failures)


def _run(folder: Path, line: str, suite: str, outcomes: Collection[Status]) -> PartReading:
    """Read the run folder that a part made.

    suite: name or file of the part's suite. outcomes: statuses of Cells that count as results, not as failures.
    """
    if not (folder / "run.json").is_file():
        return PartReading(is_missing=True)
    run = store.read_run(folder)
    latest = run.latest()
    counts = Counter(record.status.value for record in latest.values())
    rows, failures = [], []
    for record in latest.values():
        step = record.measurements.training.step_seconds if record.measurements and record.measurements.training else []
        usual = sorted(step)[len(step) // 2] if step else None
        peak = max((phase.peak_memory_B or 0 for phase in record.phases), default=0)
        rows.append([
            record.cell.label, record.status.value, f"{1e3 * usual:,.1f}" if usual is not None else "-",
            f"{peak / 2**30:,.2f}" if peak else "-", record.because,
        ])  # fmt: skip
        if record.status is not Status.OK and record.status is not Status.SKIPPED:
            trace = record.failure.traceback if record.failure is not None else ""
            again = f"peft-harness run {shlex.quote(suite)} --only {record.cell_id} --device {record.device}"
            failures.append(
                PartFailure(
                    where=f"{record.cell.label}: {record.status.value}",
                    what=record.because,
                    traceback=trace,
                    reproduce=again,
                )
            )
    missing = len(run.missing())
    parts = [f"{count} {word}" for word, count in counts.most_common()] + [f"{missing} not finished"] * (missing > 0)
    summary = ", ".join(parts)
    if latest and not failures and not counts[Status.OK.value]:
        first = next(iter(latest.values()))
        failures = [PartFailure(where=NO_CELL, what=first.because, reproduce=line)]
    table = PartTable(columns=["Cell", "status", "step, ms", "peak, GiB", "because"], rows=rows)
    untrained = "a Cell left a tensor untrained" if counts[Status.UNTRAINED.value] else ""
    wrong = "a Cell computes something else" if counts[Status.NONCONFORMING.value] else untrained
    if not wrong:
        bad = [status.value for status in _FAILED if status not in outcomes and counts[status.value]]
        wrong = f"{plural(sum(counts[one] for one in bad), 'Cell')} failed: {', '.join(bad)}" if bad else ""
    return PartReading(summary, table, failures, wrong=wrong)


def _claims(document: Mapping[str, Any], line: str) -> PartReading:
    claims = document["claims"]
    counts = Counter(one["verdict"] for one in claims)
    tried = [one for one in claims if one["verdict"] != ClaimVerdict.NOT_RUN]
    rows = [
        [one["verdict"], one["id"], one["sentence"], str(one["printed"]), *(one.get(key) or "-" for key in _OURS)]
        for one in tried
    ]
    summary = ", ".join(f"{count} {word}" for word, count in counts.most_common())
    return PartReading(summary, PartTable(columns=["verdict", "claim", "statement", "printed", *_OURS], rows=rows), [])


def _pairs(document: Mapping[str, Any], line: str) -> PartReading:
    rows = []
    for cell in document["cells"]:
        verdict = cell["verdict"] or {}
        rows.append([
            cell["name"], _ms(cell["old_s"]), _ms(cell["new_s"]), str(verdict.get("word", cell["because"] or "-")),
        ])  # fmt: skip
    found = document["verdict"]
    return PartReading(
        f"{found['word']}: {found['reason']}",
        PartTable(columns=["Cell", "first, ms", "second, ms", "verdict"], rows=rows),
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:,.1f}"


def _baseline(document: Mapping[str, Any], line: str) -> PartReading:
    judged = [row for row in document["rows"] if row["judged"] and row["word"] == VerdictKind.FAIL]
    failures = [
        PartFailure(
            where=f"{row['name']}: {row['what']}",
            what=f"{row['reason']} ({row['base']} -> {row['new']})",
            reproduce=line,
        )
        for row in judged
    ]
    return PartReading(f"{document['verdict']}: {document['reason']}", None, failures[:_MOST_FAILURES])


_READERS: dict[str, Callable[[Mapping[str, Any], str], PartReading]] = {
    "check": _check, "bench": _bench, "card": _card, "claims": _claims, "pairs": _pairs, "baseline": _baseline,
}  # fmt: skip
