"""Tables of latencies: of the base, unmerged and merged model, and of batches that mix several adapters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from statistics import median

from harness.analysis import contention, failed_checks
from harness.analysis.run_facts import RunFacts
from harness.analysis.statistics.intervals import SHARES, median_interval, percentile, samples_needed
from harness.errors import plural
from harness.records.record import Cell, Latency, Record
from harness.report import formatting
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Table, column, condensed, measured, table

_TITLE = "median with its 95 % interval, and the 95th percentile of 20 samples or more; the tooltip has all percentiles"
_PASS = column("Pass", "kind of forward pass, batch x tokens", number=False)


def latency(facts: RunFacts) -> Table:
    """Return the table with the forward times of the base, unmerged and merged model, and their ratios."""
    columns = [
        _PASS,
        *(column(f"{v}, ms", _TITLE) for v in ("Base", "Unmerged", "Merged")),
        column("Unmerged / base", "ratio of medians: the cost of an adapter at inference"),
        column("Merged / base", "ratio of medians: 1 if merging removes that cost"),
    ]
    return _noted(table(facts, "latency", "Latency of inference", columns, _latency_rows(facts)))


def _latency_rows(facts: RunFacts) -> Iterator[tuple[Cell, list[Field]]]:
    for record, m in measured(facts):
        mixed = _mixed(m.latency)  # a separate table shows these
        alone = [x for x in m.latency if x not in mixed]
        refused, merged_refused = failed_checks.no_speed(record), failed_checks.no_merged_speed(record)
        for kind, batch, tokens in dict.fromkeys((x.kind, x.batch, x.tokens) for x in alone):
            found = {x.variant: x for x in alone if (x.kind, x.batch, x.tokens) == (kind, batch, tokens)}
            base, unmerged, merged = (found.get(v) for v in ("base", "unmerged", "merged"))
            times = [
                _shown(base),
                _shown(unmerged, refused),
                _shown(merged, merged_refused),
                _ratio(unmerged, base, refused),
                _ratio(merged, base, merged_refused),
            ]
            yield record.cell, [_pass(kind, batch, tokens), *_flagged(record, times, found.values())]


def several_adapters(facts: RunFacts) -> Table:
    """Return the table that compares two kinds of batch: a different adapter in each row, or one adapter for all."""
    columns = [
        _PASS,
        column("Adapters", "number of adapters in the batch; always four"),
        column("One for all, ms", f"the same batch through one unmerged adapter: {_TITLE}"),
        column("One each, ms", _TITLE),
        column("Each / all", "ratio of medians: the cost of mixing adapters"),
    ]
    return _noted(
        condensed(table(facts, "mixed", "Several adapters in one batch", columns, _adapter_rows(facts)), fixed=2)
    )


def _adapter_rows(facts: RunFacts) -> Iterator[tuple[Cell, list[Field]]]:
    for record, m in measured(facts):
        refused, one_refused = failed_checks.no_mixed_speed(record), failed_checks.no_speed(record)
        for x in m.latency:
            if x.variant != "multi-adapter":
                continue
            same = [y for y in _mixed(m.latency) if (y.kind, y.batch, y.tokens) == (x.kind, x.batch, x.tokens)]
            one = next((y for y in same if y.variant == "unmerged"), None)
            times = [
                _shown(one, one_refused or ("" if one else x.because)),
                _shown(x, refused),
                _ratio(x, one, refused or x.because),
            ]
            fixed = [_pass(x.kind, x.batch, x.tokens), field(str(x.adapters), x.adapters)]
            yield record.cell, [*fixed, *_flagged(record, times, [x, *([one] if one else [])])]


def _flagged(record: Record, fields: Sequence[Field], timed: Iterable[Latency]) -> list[Field]:
    """Return table fields, with a flag if their latencies may be disturbed. timed: the latencies that `fields` show."""
    flag, why = contention.disturbed(record, timed)
    return [
        one | {"flag": flag, "why": "; ".join(filter(None, (one["why"], why)))} if one["value"] is not None else one
        for one in fields
    ]


def _noted(made: Table) -> Table:
    """Return a table with a note that explains each kind of flag in it."""
    rows = [{one["flag"] for one in row["fields"]} for group in made["groups"] for row in group["rows"]]
    rules = {"unsteady": contention.UNSTEADY_RULE, "busy": contention.BUSY_PASSES}
    counts = {rule: sum(flag in flags for flags in rows) for flag, rule in rules.items()}
    notes = [f"{rule}. This is so in {n} of {plural(len(rows), 'row')}." for rule, n in counts.items() if n]
    return made | {"notes": [*made["notes"], *notes], "short_flags": True}


def _mixed(found: Sequence[Latency]) -> list[Latency]:
    """Return the latencies of batches with several adapters, and of the one-adapter batches compared with them.

    Records from before 2026-11-26T14:00Z do not mark the one-adapter batches. From such a Record, return every latency
    with the batch size of a batch with several adapters.
    """
    batches = {x.batch for x in found if x.variant == "multi-adapter"}
    marked = any(x.adapters == 1 for x in found)
    return [x for x in found if (x.adapters is not None if marked else x.batch in batches)]


def _pass(kind: str, batch: int, tokens: int) -> Field:
    return field(f"{kind} {batch} × {tokens}", f"{kind} {batch:06} {tokens:06}")


def _shown(latency: Latency | None, refused: str = "") -> Field:
    """Return the field of a latency: the median with interval and percentiles. refused: reason to hide it, if any."""
    if refused:
        return unmeasured(refused)
    if latency is None:
        return unmeasured("not requested")
    if not latency.seconds:
        return unmeasured(latency.because or "no samples; the Record gives no reason")
    m = median_interval(latency.seconds)
    tail = percentile(latency.seconds, 0.95)
    small = formatting.median_ms(m) + (f" p95 {formatting.milliseconds(tail)}" if tail is not None else "")
    why = f"{m.count} samples; {_percentiles(latency)}"
    more = formatting.ends(m) | ({"p95": tail} if tail is not None else {})
    return field(formatting.milliseconds(m.value), m.value, small=small, why=why, more=more)


def _percentiles(latency: Latency) -> str:
    found = []
    for share in SHARES:
        value, name = percentile(latency.seconds, share), f"p{100 * share:.0f}"
        missing = f"no {name} with fewer than {samples_needed(share)}"
        found.append(missing if value is None else f"{name} {formatting.milliseconds(value)} ms")
    return ", ".join(found)


def _ratio(latency: Latency | None, base: Latency | None, refused: str) -> Field:
    """Return the field with the ratio of two medians. refused: reason to hide the ratio, if any."""
    if refused:
        return unmeasured(refused)
    if not latency or not base or not latency.seconds or not base.seconds or not median(base.seconds):
        return unmeasured("one of the two was not measured")
    quotient = median(latency.seconds) / median(base.seconds)
    return field(f"{quotient:.2f}", quotient)
