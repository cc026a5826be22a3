"""Format the result of a regression gate for the terminal: one table per kind of finding, then the verdict."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.comparison.baseline_rows import TIMES, GateResult, RowKind
from harness.console import align_columns
from harness.regression.outputs import formatting
from harness.regression.outputs.formatting import HEAD
from harness.report.tones import icon

_NOT_JUDGED = (RowKind.TIME, RowKind.NEW)
_ORDER = (*_NOT_JUDGED, *(kind for kind in RowKind if kind not in _NOT_JUDGED))
"""Order of the kinds of findings. Judged kinds come last, because the end of the text stays visible in a terminal."""
_GROUPED = (RowKind.ENVIRONMENT, RowKind.ASSETS)
_WORDS = ("what", "verdict")
"""Columns that are aligned to the left, as the first column is."""


def lines(result: GateResult, *, all_rows: bool = False, first: str = HEAD[0]) -> list[str]:
    """Return the lines to print. all_rows: include rows that are equal or pass. first: heading of the first column."""
    found: list[str] = []
    same: list[str] = []
    for kind in _ORDER:
        rows, left_out, equal = formatting.shown_rows(result.rows, kind, all_rows=all_rows)
        same += [f"{kind.value} {equal}"] if equal else []
        if kind in _GROUPED:
            found += [f"{kind.value} not the same, {row.name}: {row.reason}" for row in rows]
        elif rows:
            title, fields = kind.value, [formatting.fields(row) for row in rows]
            if kind is RowKind.TIME:  # the title has the reason that most rows share
                title = f"{title} ({TIMES})"
                fields = [(*line[:-1], "" if line[-1] == TIMES else line[-1]) for line in fields]
            found += [title, *_aligned((first, *HEAD[1:]), fields)]
            found += [f"  and {left_out} more rows: see --all or --json"] if left_out else []
        found += [""] if rows else []
    found += [f"rows that are equal in both: {', '.join(same)}"] if same else []
    found += [f"unreadable: {why}" for why in result.unreadable]
    found += [f"changed: {what}" for what in result.changed]
    v = result.verdict
    return [*found, f"{icon(v.word)} {v.word.value}: {v.reason}"]


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: words to the left, numbers to the right. A column without values is left out."""
    used = [i for i in range(len(head)) if not i or any(row[i] for row in rows)]
    numbers = {column for column, i in enumerate(used) if i and head[i] not in _WORDS}
    return align_columns([[row[i] for i in used] for row in (head, *rows)], right=numbers)
