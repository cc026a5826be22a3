"""Compare two runs: accuracy and costs of each of their common Cells, judged by the rules of `peft-harness gate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

from harness.analysis import contention, failed_checks, metrics
from harness.analysis.comparison import against_baseline
from harness.analysis.comparison.against_baseline import BaselineVerdict
from harness.analysis.comparison.baseline_rows import ComparisonRow, RowKind
from harness.analysis.run_facts import RunFacts
from harness.analysis.verdict_kind import VerdictKind
from harness.errors import plural
from harness.records import naming
from harness.records.record import Latency, Record
from harness.report import formatting, links
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Column, Table, column, condensed, grouped
from harness.report.tones import badge

_AROUND = (RowKind.ENVIRONMENT, RowKind.ASSETS)
"""Kinds of rows that compare the environments and the assets of two runs, not their results."""


def section(analysed: Sequence[RunFacts]) -> list[dict[str, Any]]:
    """Return the comparisons of the first run with each of the others. For a single run, return an empty list."""
    return [_pair(analysed[0], new, number) for number, new in enumerate(analysed[1:], 1)]


def lines(analysed: Sequence[RunFacts]) -> list[str]:
    """Return the comparisons of the first run with each of the others as lines for the terminal."""
    found = []
    for pair in section(analysed):
        found += ["", f"{pair['icon']} {pair['title']}: {pair['sentence']}"]
        found += [f"  {one['icon']} {one['name']}: {one['text']}" for one in pair["findings"]]
        found += [f"  differs: {one}" for one in pair["around"]]
    return found


def _pair(base: RunFacts, new: RunFacts, number: int) -> dict[str, Any]:
    result = against_baseline.judge(base, new)
    judged = [row for row in result.rows if row.word is not VerdictKind.PASS and row.kind not in _AROUND and row.judged]
    findings = [row for row in judged if not (row.kind is RowKind.MISSING and row.what == "Cell")]
    word, sentence = _whole(result, findings)
    return badge(word) | {
        "id": f"pair-{number}",
        "title": f"{new.run.manifest.run} against {base.run.manifest.run}",
        "sentence": " ".join([sentence, *_only_in_one(base, new)]),
        "table": _table(base, new, number),
        "findings": [badge(row.word) | {"name": row.name, "text": _text(row)} for row in findings],
        "around": [f"{row.what}: {_text(row)}" for row in result.rows if row.kind in _AROUND and not row.same],
    }


def _whole(result: BaselineVerdict, findings: Sequence[ComparisonRow]) -> tuple[VerdictKind, str]:
    """Return the verdict on the common Cells, and a sentence about it."""
    if not result.compared:
        return VerdictKind.NOT_RUN, "Nothing was compared: no Cell has a Record in both runs."
    failed = sum(row.word is VerdictKind.FAIL for row in findings)
    word = VerdictKind.FAIL if failed else VerdictKind.INCONCLUSIVE if findings else VerdictKind.PASS
    what = f"{plural(failed, 'finding')}, {len(findings) - failed} undecided" if findings else "no finding"
    return word, f"{plural(result.compared, 'common Cell')}: {what}, by the rules of peft-harness gate."


def _only_in_one(base: RunFacts, new: RunFacts) -> Iterator[str]:
    first, second = ({cell.cell_id for cell in side.run.manifest.cells} for side in (base, new))
    for only, which in ((first - second, "first"), (second - first, "second")):
        if only:
            yield f"{plural(len(only), 'Cell')} only in the {which} run."


def _text(row: ComparisonRow) -> str:
    values = f"{_value(row, row.base)} → {_value(row, row.new)}" if row.valued else ""
    return "; ".join(filter(None, [row.what if row.kind not in _AROUND else "", values, row.reason]))


def _value(row: ComparisonRow, value: Any) -> str:
    if value is None:
        return formatting.DASH
    if isinstance(value, str):
        return value
    if row.unit == "B":
        return f"{formatting.mebibytes(value)} MiB"
    return formatting.percent(value) if row.unit == "share" else f"{value:,.6g}"


def _table(base: RunFacts, new: RunFacts, number: int) -> Table | None:
    """Return the table with one row per Cell that both runs have; None if there is no such Cell."""
    cells = {cell.cell_id: cell for side in (base, new) for cell in side.run.manifest.cells}
    names = naming.full(cells.values())
    rows = [
        {
            "name": names[i], "title": i, "record": new.latest[i].id, "anchor": "",
            "href": f"#{links.anchor(new, i)}", "fields": list(_fields(base.latest[i], new.latest[i])),
        }
        for i in cells if i in base.latest and i in new.latest
    ]  # fmt: skip
    if not rows:
        return None
    runs = base.run.manifest.run, new.run.manifest.run
    groups, file = [(" → ".join(runs), rows)], "-and-".join(runs)
    caption = "Two runs side by side"
    return condensed(grouped(f"pair-{number}-table", caption, list(_columns()), groups, by="Runs", file=file))


def _columns() -> Iterator[Column]:
    about = {
        ("Accuracy", "%", "points"): "share of correct test items",
        ("Peak", "MiB", "%"): "highest memory in training without that of the imports",
        ("Step", "ms", "%"): "median of the steady steps; `gate --pairs` judges times, a report shows them",
        ("Merged", "ms", "%"): "median latency of the merged model, for the first kind of pass that both runs timed",
    }
    for (label, unit, of_change), title in about.items():
        yield column(f"{label}: first, {unit}", title)
        yield column(f"{label}: second, {unit}", title)
        yield column(f"{label}: change, {of_change}", title)


def _fields(base: Record, new: Record) -> Iterator[Field]:
    busy = ["busy" if contention.busy(record) else "" for record in (base, new)]
    for read, write, change, flags in (
        (metrics.ACCURACY.read, lambda x: f"{100 * x:.1f}", lambda one, other: other - one, ["", ""]),
        (metrics.PEAK_ABOVE_IMPORTS.read, formatting.mebibytes, _relative, ["", ""]),
        (metrics.STEP.value, formatting.milliseconds, _relative, busy),
    ):
        yield from _three(read(base), read(new), write, change, flags)
    kinds = [pass_ for pass_ in _merged(base) if pass_ in _merged(new)]
    one, other = (_merged(record).get(kinds[0]) if kinds else None for record in (base, new))
    flags = [contention.disturbed(record, _pass(record, kinds[0]))[0] if kinds else "" for record in (base, new)]
    yield from _three(one, other, formatting.milliseconds, _relative, flags)


def _three(
    one: float | None,
    other: float | None,
    write: Callable[[float], str],
    change: Callable[[float, float], float | None],
    flags: Sequence[str],
) -> Iterator[Field]:
    """Yield three fields: the values `one` and `other` of two runs, and their change.

    write, change: functions that format a value and compute the change. flags: a warning about each value; empty if
    none.
    """
    for value, flag in zip((one, other), flags, strict=True):
        yield unmeasured("not measured") if value is None else field(write(value), value, flag=flag)
    if one is None or other is None:
        yield unmeasured("not measured" if one == other else "only one run has it")
    else:
        changed = change(one, other)
        text = formatting.signed_percent(changed) if changed is not None else ""
        yield unmeasured("the first is 0") if changed is None else field(text, changed, flag=max(flags))


def _relative(one: float, other: float) -> float | None:
    return other / one - 1 if one else None


def _pass(record: Record, kind: tuple[str, int, int]) -> list[Latency]:
    """Return the latencies of one kind (name, batch, tokens) of forward pass, with one adapter or none."""
    measured = record.measurements.latency if record.measurements else []
    return [x for x in measured if (x.kind, x.batch, x.tokens) == kind and x.adapters is None]


def _merged(record: Record) -> dict[tuple[str, int, int], float]:
    """Return (kind, batch, tokens) of a forward pass -> median latency of the merged model in seconds."""
    if record.measurements is None or failed_checks.no_merged_speed(record):
        return {}
    return {
        (x.kind, x.batch, x.tokens): median(x.seconds)
        for x in record.measurements.latency
        if x.variant == "merged" and x.seconds and x.adapters is None
    }
