"""Format the rows of a regression gate as fields, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from harness.analysis.comparison.baseline_rows import ComparisonRow, RowKind, Unit, Value
from harness.analysis.verdict_kind import VerdictKind
from harness.report.formatting import DASH, MIB, MINUS, milliseconds, percent

HEAD = ("Cell", "what", "base", "new", "delta", "interval", "verdict")
_SHOWN = 20
"""Largest number of rows of each kind that are shown although they pass or are not judged. Further such rows are only
counted."""
_KERNEL_S = 1e-3
"""Times below this many seconds are shown in µs."""
ORDER = (VerdictKind.FAIL, VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE, VerdictKind.PASS)


def fields(row: ComparisonRow) -> tuple[str, ...]:
    """Return the fields of a row, one for each heading in HEAD."""
    values = (value(row.base, row.unit), value(row.new, row.unit)) if row.valued else ("", "")
    return (row.name, row.what, *values, delta(row), interval(row), verdict(row))


def needs_attention(row: ComparisonRow) -> bool:
    """Return whether a row is always shown, because it is judged and does not pass."""
    return row.judged and row.word is not VerdictKind.PASS


def by_severity(rows: Iterable[ComparisonRow]) -> list[ComparisonRow]:
    """Return the rows, the most serious verdicts first."""
    return sorted(rows, key=lambda row: ORDER.index(row.word))


def shown_rows(
    rows: Sequence[ComparisonRow], kind: RowKind, *, all_rows: bool = False
) -> tuple[list[ComparisonRow], int, int]:
    """Return (rows of a kind to show, number of other rows left out, number of equal rows left out).

    The most serious rows come first. A row is equal if it has the same value in both runs. all_rows: return every row
    of the kind, even equal ones.
    """
    of_kind = [row for row in rows if row.kind is kind]
    different = by_severity(row for row in of_kind if all_rows or not row.same)
    attention = [row for row in different if needs_attention(row)]
    others = [row for row in different if not needs_attention(row)]
    shown = others if all_rows else others[:_SHOWN]
    return [*attention, *shown], len(others) - len(shown), len(of_kind) - len(different)


def value(v: Value, unit: Unit) -> str:
    """Format a value with its unit; a missing value is a dash."""
    if v is None:
        return DASH
    if isinstance(v, str):
        return v
    if unit == "B":
        return f"{v:,.0f} B" if v < MIB else f"{v / MIB:,.1f} MiB"
    if unit == "nats":
        return f"{v:.3f}"
    return _time(v) if unit == "s" else percent(v) if unit == "share" else f"{v:,}"


def sentence(row: ComparisonRow, separator: str = ": ") -> str:
    """Format a row as a sentence with both values and the reason. If both values look the same, add their difference.

    separator: text between the quantity and its values.
    """
    text = row.what
    if row.valued:
        before, now = value(row.base, row.unit), value(row.new, row.unit)
        difference = f" ({delta(row)})" if before == now and row.base != row.new else ""
        text += f"{separator}{before}, now {now}{difference}"
    return f"{text}: {row.reason}" if row.reason else text


def delta(row: ComparisonRow) -> str:
    """Format the difference new - base.

    For bytes, counts and times, the change in per cent is added. Bytes and counts are not rounded. An accuracy is in
    percentage points.
    """
    d = row.delta
    if d is None or row.base == row.new:
        return "=" if row.base == row.new and row.base is not None else ""
    sign = MINUS if d < 0 else "+"
    if row.unit == "nats":
        return f"{sign}{abs(d):.3f}"
    if row.unit == "share":
        return f"{sign}{100 * abs(d):.1f} points"
    share = f" ({sign}{abs(d) / row.base:.1%})" if row.unit and isinstance(row.base, int | float) and row.base else ""
    if row.unit == "s":
        return f"{sign}{_time(abs(d))}{share}"
    return f"{sign}{abs(d):,.0f}{' B' if row.unit == 'B' else ''}{share}"


def interval(row: ComparisonRow) -> str:
    """Format the confidence interval of a row's change: for a time in per cent, else in percentage points."""
    if row.interval is None:
        return ""
    low, high = (f"{MINUS if x < 0 else '+'}{100 * abs(x):.1f}" for x in row.interval)
    return f"[{low}, {high}]{' %' if row.unit == 's' else ''}"


def verdict(row: ComparisonRow) -> str:
    """Format the verdict of a row with its reason. If the row is not judged, format only the reason."""
    if not row.judged:
        return row.reason
    return f"{row.word.value}: {row.reason}" if row.reason else row.word.value


def _time(s: float) -> str:
    """Format seconds in ms, or in µs below `_KERNEL_S`."""
    return f"{milliseconds(s)} ms" if s >= _KERNEL_S or not s else f"{milliseconds(1000 * s)} µs"
