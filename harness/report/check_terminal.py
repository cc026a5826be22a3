"""Output of `check` on a terminal: a matrix of the results, then the failures and the counts."""

from __future__ import annotations

import shlex
from collections import Counter
from typing import TYPE_CHECKING

from harness.conformance.findings import summary
from harness.conformance.findings.outcomes import CheckStatus
from harness.console import align_columns
from harness.errors import plural
from harness.records.check import CheckId
from harness.report import check_settings, check_versions

if TYPE_CHECKING:
    from harness.conformance.findings.report import CheckReport

_MOST_LINES = 40
_MOST_SUMMARIES = 12


def matrix(report: CheckReport) -> list[str]:
    """Return a table of results by target (e.g. a Method), implementation and dtype, then failures, defects and counts.

    If the checks ran in several environments, a table by version follows.
    """
    dtypes = summary.dtypes(report.tried)
    rows = [["target", "implementation", *dtypes]]
    for (target, implementation), tried in summary.rows(report.tried).items():
        fields = [summary.summarise(summary.select_dtype(tried, dtype)) for dtype in dtypes]
        # A row with results whose target is also listed as not checked was interrupted.
        part = " (interrupted)" if f"{implementation} {target}" in report.skipped else ""
        rows.append([target, implementation + part, *map(summary.format_field, fields)])
    table = align_columns(rows, right=range(2, len(rows[0])), indent="") if report.tried else []
    return [*table, *check_settings.lines(report), *lines(report), *check_versions.lines(report)]


def lines(report: CheckReport) -> list[str]:
    """Return the lines below the table: failures, each known defect once, counts, and what was not tried."""
    failures = summary.failures(report.tried)
    found = failures[:_MOST_LINES]
    if more := len(failures) - len(found):
        found.append(f"... and {more} more lines of failures; --json, --html and --junit list all")
    defects = Counter(one.defect for one in report.tried if one.status is CheckStatus.KNOWN_DEFECT)
    found += [
        f"known defect {name}: {plural(count, 'check')} (`peft-harness explain {name}`)"
        for name, count in defects.items()
    ]
    found += [f"FAIL {complaint}" for complaint in report.complaints]
    found += [f"BROKEN plug-in {name}: {why}" for name, why in report.broken.items()]
    found += [f"not checked: {name}: {why}" for name, why in report.skipped.items()]
    counts = {status: report.count(status) for status in CheckStatus}
    found += _in_common(report)
    found += _unsupported(report)
    names = {CheckStatus.PASS: "passed", CheckStatus.FAIL: "failed", CheckStatus.KNOWN_DEFECT: "known defects"}
    found.append(", ".join(f"{count} {names.get(s, s.value)}" for s, count in counts.items() if count or s in names))
    if counts[CheckStatus.SKIPPED]:
        found.append("a check is skipped in a case to which it does not apply; --json and --html give each reason")
    found += _next_commands(report)
    if report.untried:
        found.append(f"requested, but not tried: {', '.join(report.untried)}")
    if report.interrupted:
        found.append("interrupted: results so far")
    return found


def _in_common(report: CheckReport) -> list[str]:
    """Return a line for each failing check of each implementation: in how many cases it fails, and what they share."""
    found = report.in_common()
    lines = [f"{one.implementation} {one.target}: {one.check} {one}" for one in found[:_MOST_SUMMARIES]]
    if more := len(found) - len(lines):
        lines.append(f"... and {plural(more, 'more failing check')}; --json and --html list all")
    return lines


def _unsupported(report: CheckReport) -> list[str]:
    """Return a line for each reason why a case was unsupported, if a single implementation was checked."""
    if len({one.provider for one in report.tried}) > 1:
        return []
    unsupported = [one for one in report.tried if one.status is CheckStatus.UNSUPPORTED]
    found = Counter((one.target, one.result.detail) for one in unsupported)
    lines = [f"{target}: {plural(count, 'check')} {why}" for (target, why), count in found.items()]
    more = [f"... and {plural(len(lines) - _MOST_SUMMARIES, 'more reason')}; --json and --html list all"]
    return lines[:_MOST_SUMMARIES] + (more if len(lines) > _MOST_SUMMARIES else [])


def _next_commands(report: CheckReport) -> list[str]:
    """Return the commands that explain and repeat the first failure.

    Return no line if nothing failed, for a training loop (`check --loop`), and if the checks ran in several environments.
    """
    first = next((one for one in report.tried if one.status is CheckStatus.FAIL and not one.environment), None)
    if first is None or report.options is None:
        return []
    option = "--op" if first.kind == "operation" else "--method"
    options = [shlex.quote(first.implementation), option, first.target, *report.options]
    if first.dtype != "-" and not any(one.startswith("--case") for one in report.options):  # a crash has no case
        options.append(f"--case {shlex.quote(f'{first.case} {first.dtype}')}")
    return [
        "next, for the first failure:",
        f"  peft-harness explain {CheckId.parse(first.result.check).check}",
        f"  peft-harness check {' '.join(options)}",
    ]
