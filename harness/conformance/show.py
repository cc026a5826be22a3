"""The matrix of `check` on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from harness.conformance import summary
from harness.conformance.summary import Field
from harness.conformance.tried import Standing, Tried

if TYPE_CHECKING:
    from harness.conformance.command import Report

_MOST_LINES = 40
_STYLES = {Standing.FAIL: "bold red", Standing.KNOWN_DEFECT: "yellow", Standing.PASS: "green"}


def print_matrix(report: Report) -> None:
    """Print implementation x method or operation x dtype, then every failure, every defect, and the count."""
    console = Console(highlight=False)
    dtypes = summary.dtypes(report.tried)
    table = Table(box=None, pad_edge=False)
    for heading in ("method or operation", "implementation"):
        table.add_column(heading)
    for dtype in dtypes:
        table.add_column(dtype, justify="right")
    for (target, implementation), tried in summary.rows(report.tried).items():
        fields = [summary.field(summary.of_dtype(tried, dtype)) for dtype in dtypes]
        cells = [Text(words(one), style=_STYLES.get(one.standing, "dim") if one else "dim") for one in fields]
        table.add_row(target, implementation, *cells)
    if report.tried:
        console.print(table)
    for line in lines(report):
        console.print(Text(line), soft_wrap=True)


def words(field: Field | None) -> str:
    """Say what stands in a field: the standing, and how much of what was allowed the worst error used."""
    if field is None:
        return "-"
    if field.standing is Standing.FAIL:
        return f"FAIL {field.count}/{field.total}"
    if field.standing is Standing.KNOWN_DEFECT:
        return f"defect {field.count}/{field.total}"
    if field.standing is Standing.PASS:
        return "ok" if field.share is None else f"ok {field.share:.2f}"
    return field.standing.value


def lines(report: Report) -> list[str]:
    """Say every failure, each known defect once, what was not tried, and the count."""
    failed = [one for one in report.tried if one.standing is Standing.FAIL]
    said = [failure(one) for one in failed[:_MOST_LINES]]
    if len(failed) > _MOST_LINES:
        said.append(f"... and {len(failed) - _MOST_LINES} more failures; --json, --html and --junit have them all")
    defects: dict[str, int] = {}
    for one in report.tried:
        if one.standing is Standing.KNOWN_DEFECT:
            defects[one.defect] = defects.get(one.defect, 0) + 1
    said += [f"known defect {name}: {count} checks (`peft-harness explain {name}`)" for name, count in defects.items()]
    said += [f"FAIL {complaint}" for complaint in report.complaints]
    said += [f"BROKEN plug-in {name}: {why}" for name, why in report.broken.items()]
    said += [f"not checked: {name}: {why}" for name, why in report.skipped.items()]
    counts = {standing: report.count(standing) for standing in Standing}
    names = {Standing.PASS: "passed", Standing.FAIL: "failed", Standing.KNOWN_DEFECT: "known defects"}
    said.append(", ".join(f"{count} {names.get(s, s.value)}" for s, count in counts.items() if count or s in names))
    if report.interrupted:
        said.append("interrupted: this is what was found so far")
    return said


def failure(one: Tried) -> str:
    """Say in one line what failed, where, and by how much."""
    return f"FAIL {one.implementation} {one.result.check} ({one.case}): {' '.join(told(one).split())}"


def told(one: Tried) -> str:
    """Say by how much a check failed, in which tensor, and at which element."""
    r = one.result
    size = f"error {r.error:.3g}, allowed {r.allowed:.3g}" if r.error is not None and r.allowed is not None else ""
    place = " ".join(filter(None, [r.tensor, r.worst]))
    nonfinite = f"{r.nonfinite} elements not finite" if r.nonfinite else ""
    policy = f" [{r.policy}]" if r.policy.startswith("noise-floor") else ""
    return "; ".join(filter(None, [size, place, nonfinite, r.detail])) + policy
