"""How the numbers of a gate are written, for the terminal and for Markdown alike: a line of fields for each row."""

from __future__ import annotations

from collections.abc import Sequence

from harness.analysis.comparison.baseline_rows import ComparisonRow, FindingKind, Unit, Value
from harness.analysis.verdict_kind import VerdictKind
from harness.report.formatting import DASH, MIB, MINUS, milliseconds, percent

HEAD = ("Cell", "what", "base", "new", "delta", "interval", "verdict")
_SHOWN = 20
"""Rows that neither fail nor are left open, of each kind, before the rest is only counted."""
_KERNEL_S = 1e-3
"""Below that a time has too few digits in ms."""
ORDER = (VerdictKind.FAIL, VerdictKind.NOT_RUN, VerdictKind.INCONCLUSIVE, VerdictKind.PASS)
LOUD = (VerdictKind.FAIL, VerdictKind.INCONCLUSIVE)


def fields(row: ComparisonRow) -> tuple[str, ...]:
    """Return a row's fields, as many as HEAD has."""
    values = (value(row.base, row.unit), value(row.new, row.unit)) if row.valued else ("", "")
    return (row.name, row.what, *values, delta(row), interval(row), verdict(row))


def loud(row: ComparisonRow) -> bool:
    """Say whether a row is shown however many there are."""
    return row.judged and row.word is not VerdictKind.PASS


def told(
    rows: Sequence[ComparisonRow], kind: FindingKind, *, everything: bool = False
) -> tuple[list[ComparisonRow], int, int]:
    """Return the rows of a kind to show, the most serious first; how many are left out; how many are the same in both.

    everything: leave nothing out, and what is the same is shown too.
    """
    mine = [row for row in rows if row.kind is kind]
    same = [] if everything else [row for row in mine if row.same]
    differ = sorted((row for row in mine if everything or not row.same), key=lambda row: ORDER.index(row.word))
    shown, quiet = [row for row in differ if loud(row)], [row for row in differ if not loud(row)]
    kept = quiet if everything else quiet[:_SHOWN]
    return [*shown, *kept], len(quiet) - len(kept), len(same)


def value(v: Value, unit: Unit) -> str:
    """Write a value in its unit; a dash where there is none."""
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
    """Write both values in words, and by how much they differ where they are written alike; nothing without any."""
    if not row.valued:
        return ""
    before, now = value(row.base, row.unit), value(row.new, row.unit)
    return f"{before}, now {now}" + (f" ({delta(row)})" if before == now and row.base != row.new else "")


def delta(row: ComparisonRow) -> str:
    """Write new minus base: bytes and counts exactly, shares in points, and what it is in per cent."""
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
    """Write the interval of the difference, in points, or of a time in per cent."""
    if row.interval is None:
        return ""
    low, high = (f"{MINUS if x < 0 else '+'}{100 * abs(x):.1f}" for x in row.interval)
    return f"[{low}, {high}]{' %' if row.unit == 's' else ''}"


def verdict(row: ComparisonRow) -> str:
    """Write a row's word and reason; of what is not judged, the reason alone."""
    if not row.judged:
        return row.reason
    return f"{row.word.value}: {row.reason}" if row.reason else row.word.value


def _time(s: float) -> str:
    """Write seconds as ms, and what kernels take as µs."""
    return f"{milliseconds(s)} ms" if s >= _KERNEL_S or not s else f"{milliseconds(1000 * s)} µs"
