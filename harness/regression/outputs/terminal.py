"""Format a gate for the terminal: one table per kind of finding, the verdict last."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.comparison.baseline_rows import TIMES, FindingKind, Findings
from harness.regression.outputs import formatting
from harness.regression.outputs.formatting import HEAD
from harness.report.tones import icon

_ORDER = (
    FindingKind.TIME,
    FindingKind.NEW,
    *(kind for kind in FindingKind if kind not in (FindingKind.TIME, FindingKind.NEW)),
)
"""Kinds that are not judged come first, since a terminal shows the end."""
_GROUPED = (FindingKind.ENVIRONMENT, FindingKind.ASSETS)
_LEFT = ("what", "verdict")


def lines(findings: Findings, *, all_rows: bool = False, of: str = HEAD[0]) -> list[str]:
    """Return the lines to print. all_rows: also rows that are equal or pass. of: heading of the first column."""
    found: list[str] = []
    same: list[str] = []
    for kind in _ORDER:
        rows, left_out, equal = formatting.shown_rows(findings.rows, kind, all_rows=all_rows)
        if equal:
            same.append(f"{kind.value} {equal}")
        if not rows:
            continue
        if kind in _GROUPED:
            found += [f"{kind.value} not the same, {row.name}: {row.reason}" for row in rows] + [""]
            continue
        head = f"{kind.value} ({TIMES})" if kind is FindingKind.TIME else kind.value
        written = [list(formatting.fields(row)) for row in rows]
        if kind is FindingKind.TIME:  # the heading has the text
            written = [[*line[:-1], "" if line[-1] == TIMES else line[-1]] for line in written]
        found += [head, *_aligned([[of, *HEAD[1:]], *written])]
        found += [f"  and {left_out} more that need no look: --all, or --json"] if left_out else []
        found.append("")
    found += [f"the same in both, rows: {', '.join(same)}"] if same else []
    found += [f"unreadable: {why}" for why in findings.unreadable]
    found += [f"changed: {what}" for what in findings.changed]
    v = findings.verdict
    return [*found, f"{icon(v.word)} {v.word.value}: {v.reason}"]


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns, words to the left and numbers to the right; a column with only a heading is left out."""
    used = [i for i in range(len(rows[0])) if not i or any(row[i] for row in rows[1:])]
    widths = {i: max(len(row[i]) for row in rows) for i in used}
    return [
        "  "
        + "  ".join(
            f"{row[i]:<{widths[i]}}" if not i or rows[0][i] in _LEFT else f"{row[i]:>{widths[i]}}" for i in used
        ).rstrip()
        for row in rows
    ]
