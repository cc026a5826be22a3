"""The matrix of `check` on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.conformance.tried import Standing, Tried

if TYPE_CHECKING:
    from harness.conformance.command import Report

_MOST_LINES = 40


def print_matrix(report: Report) -> None:
    """Print implementation x method or operation x dtype, then every failure, every defect, and the count."""
    console = Console(highlight=False)
    dtypes = [d for d in ("float64", "float32", "bfloat16", "float16") if any(t.dtype == d for t in report.tried)]
    table = Table(box=None, pad_edge=False)
    for heading in ("method or operation", "implementation"):
        table.add_column(heading)
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    rows: dict[tuple[str, str], list[Tried]] = {}
    for one in report.tried:
        rows.setdefault((one.target, one.implementation), []).append(one)
    for (target, implementation), tried in sorted(rows.items()):
        cells = [cell([t for t in tried if t.dtype == dtype]) for dtype in dtypes]
        table.add_row(target, implementation, *(Text(words, style=style) for words, style in cells))
    console.print(table)
    for line in lines(report):
        console.print(Text(line), soft_wrap=True)


def cell(tried: Sequence[Tried]) -> tuple[str, str]:
    """Return what stands in one field of the matrix and its style: the worst error as a share of what was allowed."""
    standings = [one.standing for one in tried]
    if not tried:
        return "-", "dim"
    if failed := standings.count(Standing.FAIL):
        return f"FAIL {failed}/{len(tried)}", "bold red"
    if known := standings.count(Standing.KNOWN_DEFECT):
        return f"defect {known}/{len(tried)}", "yellow"
    if Standing.PASS not in standings:
        return ("unsupported" if Standing.UNSUPPORTED in standings else "skipped"), "dim"
    used = [one.share for one in tried if one.share is not None]
    return (f"ok {max(used):.2f}" if used else "ok"), "green"


def lines(report: Report) -> list[str]:
    """Say every failure, each known defect once, what was not tried, and the count."""
    failed = [one for one in report.tried if one.standing is Standing.FAIL]
    said = [failure(one) for one in failed[:_MOST_LINES]]
    if len(failed) > _MOST_LINES:
        said.append(f"... and {len(failed) - _MOST_LINES} more failures; --json has them all")
    defects: dict[str, int] = {}
    for one in report.tried:
        if one.standing is Standing.KNOWN_DEFECT:
            defects[one.defect] = defects.get(one.defect, 0) + 1
    said += [f"known defect {name}: {count} checks (`peft-harness explain {name}`)" for name, count in defects.items()]
    said += [f"FAIL {complaint}" for complaint in report.complaints]
    said += [f"BROKEN plug-in {name}: {why}" for name, why in report.broken.items()]
    said += [f"not checked: {name}: {why}" for name, why in report.skipped.items()]
    counts = {standing: report.count(standing) for standing in Standing}
    words = {Standing.PASS: "passed", Standing.FAIL: "failed", Standing.KNOWN_DEFECT: "known defects"}
    said.append(", ".join(f"{count} {words.get(s, s.value)}" for s, count in counts.items() if count or s in words))
    return said


def failure(one: Tried) -> str:
    """Say what failed, where, and by how much."""
    r = one.result
    size = f"error {r.error:.3g}, allowed {r.allowed:.3g}; " if r.error is not None and r.allowed is not None else ""
    policy = f" [{r.policy}]" if r.policy.startswith("noise-floor") else ""
    told = f"{size}{r.tensor} {r.worst} {r.detail}".strip()
    return f"FAIL {one.implementation} {r.check} ({one.case}): {told}{policy}"
