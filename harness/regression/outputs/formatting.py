"""Format the rows of a gate as fields, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.comparison.baseline_rows import ComparisonRow, FindingKind, Unit, Value
from harness.analysis.verdict_kind import VerdictKind
from harness.report.formatting import DASH, MIB, MINUS, milliseconds, percent

HEAD = ("Cell", "what", "base", "new", "delta", "interval", "verdict")
_SHOWN = 20
"""Rows of each kind that are shown although they neither fail nor stay undecided; further ones are counted."""
_KERNEL_S = 1e-3
"""Shorter times are shown in µs."""
ORDER = (VerdictKind.FAIL, VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE, VerdictKind.PASS)
LOUD = (VerdictKind.FAIL, VerdictKind.INCONCLUSIVE)


def fields(row: ComparisonRow) -> tuple[str, ...]:
    """Return a row's fields, as many as HEAD has."""
    values = (value(row.base, row.unit), value(row.new, row.unit)) if row.valued else ("", "")
    return (row.name, row.what, *values, delta(row), interval(row), verdict(row))


def loud(row: ComparisonRow) -> bool:
    """Return whether a row is always shown."""
    return row.judged and row.word is not VerdictKind.PASS


def shown_rows(
    rows: Sequence[ComparisonRow], kind: FindingKind, *, all_rows: bool = False
) -> tuple[list[ComparisonRow], int, int]:
    """Return the rows of a kind to show, the most serious first; the number left out; the number equal in both runs.

    all_rows: leave nothing out, rows that are equal in both runs included.
    """
    mine = [row for row in rows if row.kind is kind]
    same = [] if all_rows else [row for row in mine if row.same]
    differ = sorted((row for row in mine if all_rows or not row.same), key=lambda row: ORDER.index(row.word))
    shown, quiet = [row for row in differ if loud(row)], [row for row in differ if not loud(row)]
    some = quiet if all_rows else quiet[:_SHOWN]
    return [*shown, *some], len(quiet) - len(some), len(same)


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


def change(row: ComparisonRow) -> str:
    """Format both values, and their difference if both look equal; empty without values."""
    if not row.valued:
        return ""
    before, now = value(row.base, row.unit), value(row.new, row.unit)
    return f"{before}, now {now}" + (f" ({delta(row)})" if before == now and row.base != row.new else "")


def delta(row: ComparisonRow) -> str:
    """Format new - base: bytes and counts exactly, shares in points, both with per cent."""
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
    """Format the interval of the difference, in points; of a time in per cent."""
    if row.interval is None:
        return ""
    low, high = (f"{MINUS if x < 0 else '+'}{100 * abs(x):.1f}" for x in row.interval)
    return f"[{low}, {high}]{' %' if row.unit == 's' else ''}"


def verdict(row: ComparisonRow) -> str:
    """Format the verdict of a row with its reason; of a row that is not judged, the reason alone."""
    if not row.judged:
        return row.reason
    return f"{row.word.value}: {row.reason}" if row.reason else row.word.value


def _time(s: float) -> str:
    """Format seconds in ms, short times in µs."""
    return f"{milliseconds(s)} ms" if s >= _KERNEL_S or not s else f"{milliseconds(1000 * s)} µs"
