"""Figures of latencies: median, interval, percentiles, ratios; and the table of several adapters in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from harness.analysis import failed_checks
from harness.analysis.run_facts import RunFacts
from harness.analysis.statistics.intervals import median_interval
from harness.analysis.statistics.percentiles import SHARES, needed, percentile
from harness.records.record import Latency
from harness.report import formatting
from harness.report.formatting import Figure, figure, unmeasured
from harness.report.table_model import Table, column, measurements, table

TITLE = "median with its 95 % interval, and the 95th percentile of 20 samples or more; the tooltip has all percentiles"


def shown(latency: Latency | None, refused: str = "") -> Figure:
    """Return the figure of a median with interval and percentiles. refused: reason why it may not be shown."""
    if refused:
        return unmeasured(refused)
    if latency is None:
        return unmeasured("not requested")
    if not latency.seconds:
        return unmeasured(latency.because or "no samples; the Record gives no reason")
    m = median_interval(latency.seconds)
    tail = percentile(latency.seconds, 0.95)
    small = formatting.median_ms(m) + (f" p95 {formatting.milliseconds(tail)}" if tail is not None else "")
    return figure(
        formatting.milliseconds(m.value), m.value, small=small, why=f"{m.count} samples; {_percentiles(latency)}"
    )


def _percentiles(latency: Latency) -> str:
    found = []
    for share in SHARES:
        value, name = percentile(latency.seconds, share), f"p{100 * share:.0f}"
        found.append(
            f"{name} {formatting.milliseconds(value)} ms" if value is not None else f"no {name} under {needed(share)}"
        )
    return ", ".join(found)


def ratio(latency: Latency | None, base: Latency | None, refused: str) -> Figure:
    """Show a ratio of two medians."""
    if refused:
        return unmeasured(refused)
    if not latency or not base or not latency.seconds or not base.seconds or not median(base.seconds):
        return unmeasured("one of the two was not measured")
    quotient = median(latency.seconds) / median(base.seconds)
    return figure(f"{quotient:.2f}", quotient)


def mixed(found: Sequence[Latency]) -> list[Latency]:
    """Return the batches of several adapters, and the batch of one adapter that they are compared with.

    Records from before 2026-11-26T14:00Z do not mark that batch, and have no other batch of its size.
    """
    batches = {x.batch for x in found if x.variant == "multi-adapter"}
    marked = any(x.adapters == 1 for x in found)
    return [x for x in found if (x.adapters is not None if marked else x.batch in batches)]


def several(facts: RunFacts) -> Table:
    """Tabulate batches with one adapter per row, compared with the same batch through one adapter."""
    columns = [
        column("What", "kind of forward pass, batch x tokens", number=False),
        column("Adapters", "each row of the batch goes through another one; always four"),
        column("One for all, ms", f"the same batch through one unmerged adapter: {TITLE}"),
        column("One each, ms", TITLE),
        column("Each / all", "ratio of medians: what mixing costs"),
    ]
    rows = []
    for cell, m in measurements(facts):
        record = facts.latest[cell.cell_id]
        refused, one_refused = failed_checks.no_mixed_speed(record), failed_checks.no_speed(record)
        for x in m.latency:
            if x.variant != "multi-adapter":
                continue
            same = [y for y in mixed(m.latency) if (y.kind, y.batch, y.tokens) == (x.kind, x.batch, x.tokens)]
            one = next((y for y in same if y.variant == "unmerged"), None)
            figures = [
                figure(f"{x.kind} {x.batch} × {x.tokens}", f"{x.kind} {x.batch:06} {x.tokens:06}"),
                figure(str(x.adapters), x.adapters),
                shown(one, one_refused or ("" if one else x.because)),
                shown(x, refused),
                ratio(x, one, refused or x.because),
            ]
            rows.append({"cell": cell, "figures": figures})
    return table(facts, "mixed", "Several adapters in one batch", columns, rows)
