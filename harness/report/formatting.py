"""Formatting of numbers. A missing number is shown as a dash with its reason, never as 0."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from harness.analysis.ranking import Score
from harness.analysis.statistics.intervals import Median
from harness.records.check import CheckResult
from harness.records.record import Accuracy

DASH = "—"
MINUS = "−"
MIB = 1024 * 1024
GIB = 1024 * MIB

_MARKDOWN = re.compile(r"([\\`*_\[\]{}<>|~#])")

Field = dict[str, Any]
"""Content of a table cell:

- `text`: the shown text; `small`: text in small print beside it; `tone`: the colour.
- `value`: sort key of the table; None for a missing value.
- `flag`: a short warning; `why`: the tooltip.
- `more`: further columns of the CSV file, by name: numbers in the unit of `value`, or texts."""


def field(
    text: str,
    value: float | str | None,
    *,
    small: str = "",
    why: str = "",
    tone: str = "",
    flag: str = "",
    more: Mapping[str, float | str] | None = None,
) -> Field:
    """Return the content of a table cell. `Field` explains the arguments."""
    details = dict(more or {})
    return {"text": text, "value": value, "small": small, "why": why, "tone": tone, "flag": flag, "more": details}


def unmeasured(why: str) -> Field:
    """Return a field with a dash for a value that was not measured. why: the reason."""
    return field(DASH, None, why=why, tone="quiet")


def mebibytes(size: float) -> str:
    """Format bytes in MiB: without decimals from 10 MiB on, with two decimals below 10 MiB."""
    mib = size / MIB
    return f"{mib:,.0f}" if mib >= 10 else f"{mib:.2f}"


def short_count(n: float) -> str:
    """Format a count with three significant digits, e.g. 1234567 -> "1.23 M"."""
    for unit, name in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if n >= unit:
            return f"{n / unit:.3g}{name}"
    return f"{n:.3g}"


def seconds(s: float) -> str:
    """Format a duration in min, s or ms."""
    if s >= 120:
        minutes, rest = divmod(round(s), 60)
        return f"{minutes} min {rest:02d} s"
    return f"{s:.1f} s" if s >= 1 else f"{1000 * s:.0f} ms"


def milliseconds(s: float) -> str:
    """Format seconds in ms with about three digits."""
    ms = 1000 * s
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.1f}" if ms >= 10 else f"{ms:.2f}"


def percent(share: float) -> str:
    """Format a share in per cent with one decimal, e.g. 0.5 -> "50.0 %"."""
    return f"{100 * share:.1f} %"


def points(difference: float) -> str:
    """Format the difference of two shares in percentage points, with its sign."""
    return f"{signed_percent(difference)} points"


def signed_percent(share: float) -> str:
    """Format a share in per cent, with its sign but without the unit, e.g. 0.05 -> "+5.0"."""
    return f"{MINUS if share < 0 else '+'}{abs(100 * share):.1f}"


def probability(p: float) -> str:
    """Format a p value, e.g. "p = 0.012" or "p < 0.001"."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.2g}"


def scientific(x: float | None) -> str:
    """Format an error or a bound with three significant digits. None becomes a dash."""
    if x is None:
        return DASH
    return f"{x:.3g}" if x == 0 or 1e-3 <= abs(x) < 1000 else f"{x:.2e}"


def check_fields(check: CheckResult) -> dict[str, str]:
    """Format the numbers and texts of a check, for one row of a table."""
    texts = {name: getattr(check, name) or DASH for name in ("tensor", "worst", "policy")}
    nonfinite = f"{check.nonfinite} not finite" if check.nonfinite else ""
    return texts | {
        "check": check.check,
        "error": scientific(check.error),
        "allowed": scientific(check.allowed),
        "share": DASH if check.share is None else f"{check.share:.2g}",
        "detail": "; ".join(filter(None, [check.detail, nonfinite])),
    }


def accuracy(a: Accuracy | Score) -> str:
    """Format an accuracy with its interval, in per cent."""
    return f"{percent(a.value)} {interval(a)}"


def interval(a: Accuracy | Score) -> str:
    """Format the interval of an accuracy, in per cent."""
    return f"[{100 * a.low:.1f}, {100 * a.high:.1f}]"


def ends(x: Accuracy | Score | Median) -> dict[str, float]:
    """Return the ends of an interval for the argument `more` of `field`. If there is no interval, return {}."""
    return {} if x.low is None or x.high is None else {"low": x.low, "high": x.high}


def median_ms(m: Median) -> str:
    """Format the interval of a median in ms. If there are too few samples for an interval, format their number."""
    if m.low is None or m.high is None:
        return f"n = {m.count}"
    return f"[{milliseconds(m.low)}, {milliseconds(m.high)}]"


def sentence(text: str) -> str:
    """Return a text with a capital first letter."""
    return f"{text[:1].upper()}{text[1:]}"


def escape_markdown(text: str) -> str:
    """Return a text on one line, with the characters escaped that have a meaning in Markdown."""
    return _MARKDOWN.sub(r"\\\1", " ".join(text.split()))
