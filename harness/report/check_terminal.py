"""The matrix of `check` on a terminal."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.conformance.findings import summary
from harness.conformance.findings.outcomes import CheckStatus

if TYPE_CHECKING:
    from harness.conformance.findings.report import CheckReport

_PIPE_WIDTH = 140
_MOST_LINES = 40
_STYLES = {CheckStatus.FAIL: "bold red", CheckStatus.KNOWN_DEFECT: "yellow", CheckStatus.PASS: "green"}


def print_matrix(report: CheckReport) -> None:
    """Print a table of results by method or operation, implementation and dtype. Then print what `lines` returns."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _PIPE_WIDTH)
    dtypes = summary.dtypes(report.tried)
    table = Table(box=None, pad_edge=False)
    for heading in ("method or operation", "implementation"):
        table.add_column(heading, overflow="fold")  # long names fold, so that they are never cut
    for dtype in dtypes:
        table.add_column(dtype, justify="right", overflow="fold")
    for (target, implementation), tried in summary.rows(report.tried).items():
        fields = [summary.summarise(summary.select_dtype(tried, dtype)) for dtype in dtypes]
        cells = [
            Text(summary.format_field(one), style=_STYLES.get(one.status, "dim") if one else "dim") for one in fields
        ]
        table.add_row(target, implementation, *cells)
    if report.tried:
        console.print(table)
    for line in lines(report):
        console.print(Text(line), soft_wrap=True)


def lines(report: CheckReport) -> list[str]:
    """Return the lines below the table: failures, each known defect once, counts, and what was not tried."""
    failed = [one for one in report.tried if one.status is CheckStatus.FAIL]
    found = [summary.describe_failure(one) for one in failed[:_MOST_LINES]]
    if len(failed) > _MOST_LINES:
        found.append(f"... and {len(failed) - _MOST_LINES} more failures; --json, --html and --junit list all")
    defects = Counter(one.defect for one in report.tried if one.status is CheckStatus.KNOWN_DEFECT)
    found += [f"known defect {name}: {count} checks (`peft-harness explain {name}`)" for name, count in defects.items()]
    found += [f"FAIL {complaint}" for complaint in report.complaints]
    found += [f"BROKEN plug-in {name}: {why}" for name, why in report.broken.items()]
    found += [f"not checked: {name}: {why}" for name, why in report.skipped.items()]
    counts = {status: report.count(status) for status in CheckStatus}
    names = {CheckStatus.PASS: "passed", CheckStatus.FAIL: "failed", CheckStatus.KNOWN_DEFECT: "known defects"}
    found.append(", ".join(f"{count} {names.get(s, s.value)}" for s, count in counts.items() if count or s in names))
    if report.untried:
        found.append(f"requested, but not tried: {', '.join(report.untried)}")
    if report.interrupted:
        found.append("interrupted: results so far")
    return found
