"""Parsing of figures (numbers that papers print), and comparison with computed numbers, in exact fractions.

Imports no torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal, NamedTuple

from harness.errors import did_you_mean

Dimension = Literal["count", "bytes", "bits", "share", "ratio", "seconds", "rate", "number", "property"]
"""Kind of quantity of a measure. A `count` is a number of things. A `share` is a part of a whole. A `rate` is in tokens
per second. A `property` is true or false and has no figure."""

_THOUSANDS: dict[str, Fraction] = {"K": Fraction(10**3), "M": Fraction(10**6), "B": Fraction(10**9)}
_BYTES: dict[str, Fraction] = {
    f"{prefix}{end}": Fraction(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("iB", 1024))
}
# A bare letter is a paper's shorthand for the decimal unit. If only the binary unit agrees, the verdict says so.
UNITS: dict[Dimension, dict[str, Fraction]] = {
    "count": {"": Fraction(1), **_THOUSANDS},
    "bytes": {"B": Fraction(1), **_BYTES, **{letter: _BYTES[f"{letter}B"] for letter in "KMGT"}},
    "bits": {"": Fraction(1), "bit": Fraction(1)},
    "share": {"%": Fraction(1, 100), "": Fraction(1)},
    "ratio": {"x": Fraction(1), "": Fraction(1)},
    "seconds": {"s": Fraction(1), "ms": Fraction(1, 1000), "min": Fraction(60)},
    "rate": {"tokens/s": Fraction(1)},
    "number": {"": Fraction(1)},
    "property": {},
}
_QUOTED = 60
_DIGITS = r"[+-]?(?:[0-9]{1,3}(?:,[0-9]{3}){1,9}|[0-9]{1,30})(?:\.[0-9]{1,30})?(?:e[+-]?[0-9]{1,2})?"
"""Regular expression for a number. It limits the number of digits, so that parsing is fast."""
_FORM = re.compile(rf"(?P<relation><=|>=|<|>)?\s*(?P<digits>{_DIGITS})\s*(?P<unit>[A-Za-z%/]*)")
_NUMBER = re.compile(rf"{_DIGITS}(?:/[0-9]{{1,30}})?%?")


@dataclass(frozen=True)
class Printed:
    """A figure as a paper prints it, such as `< 48 GB`."""

    text: str
    number: Fraction
    """The figure in base units (1, byte, second)."""
    last: Fraction
    """Value of one step of the last printed digit, in base units: 100,000 for `0.3M`."""
    unit: str
    """The unit as printed. Empty if the figure has no unit."""
    relation: str = ""
    """The relation that the computed number must have to the figure: `<`, `<=`, `>` or `>=`. Empty if none is
    printed."""
    dimension: Dimension = "number"


@dataclass(frozen=True)
class Rounding:
    """The rule that decides whether a computed number agrees with a printed figure."""

    rule: Literal["nearest", "cut", "magnitude", "about"] = "nearest"
    """`nearest`: the number rounds to the figure. `cut`: the number with its further digits cut off is the figure (1.59
    and `1.5`). `magnitude`: both have the same nearest power of ten. `about`: the difference is at most `within`."""
    within: Fraction = Fraction(0)
    """Largest allowed difference for the rule `about`, as a share of the printed figure."""

    @property
    def words(self) -> str:
        """The rule in words. Empty for `nearest`."""
        if self.rule == "about" and self.within:
            return f"within {shown(self.within, 'share')} of the printed figure"
        return RULES[self.rule]


class FigureConvention(NamedTuple):
    """A way to read the digits and the unit of a figure."""

    cut: bool
    """True if the digits are cut off instead of rounded. Without effect if the claim has a rule or a relation."""
    binary: bool
    """True if MB means MiB. Without effect on other figures than sizes in decimal units."""


CONVENTIONS = tuple(FigureConvention(cut, binary) for cut in (False, True) for binary in (False, True))
"""All conventions, in the order in which `agrees` tries them. The first is: as printed."""

_CUT = "digits cut off, not rounded"
RULES = {
    "nearest": "", "cut": _CUT, "magnitude": "of the same order of magnitude, by the nearest power of ten",
    "about": "equal to the printed figure",
}  # fmt: skip
"""Rule of `Rounding` -> description for a report. For `about` with a tolerance, `Rounding.words` makes another text."""
NEAREST = Rounding()


def parse(text: str, dimension: Dimension) -> Printed:
    """Parse a figure such as `0.3M`, `< 48 GB` or `10,000x`, and return it.

    Raises ValueError for any other text. In its message, the part after `;` is a hint.
    """
    units = UNITS[dimension]
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is not a figure; write e.g. {_example(dimension)}, optionally after < or >")
    unit = found["unit"]
    if unit not in units:
        hint = did_you_mean(unit, filter(None, units), "write it as one of") if any(units) else "write none"
        raise ValueError(f"{text!r} has the unit {unit!r}, but the measure is in {dimension}; {hint}")
    digits = found["digits"].replace(",", "")
    mantissa, _, exponent = digits.partition("e")
    last = Fraction(10) ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
    return Printed(text, Fraction(digits) * units[unit], last * units[unit], unit, found["relation"] or "", dimension)


def _example(dimension: Dimension) -> str:
    unit = next(iter(units)) if (units := [u for u in UNITS[dimension] if u]) else ""
    return f"`12.3 {unit}`".replace(" `", "`")


def exact(written: Any) -> Fraction | None:
    """Return a written number, such as `1.5e6`, `2/3` or `20%`, as an exact fraction. Return None for anything else."""
    if isinstance(written, bool) or not isinstance(written, int | float | str):
        return None
    text = getattr(written, "text", str(written)).strip()
    if not _NUMBER.fullmatch(text):
        return None
    top, _, bottom = text.removesuffix("%").replace(",", "").partition("/")
    if bottom and not int(bottom):
        return None
    return Fraction(top) / int(bottom or 1) / (100 if text.endswith("%") else 1)


def shortly(written: Any) -> str:
    """Return a value as text for a message, cut if it is long."""
    text = repr(written)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 4]} ..."


def agrees(printed: Printed, value: Fraction, rounding: Rounding, most: Fraction | None = None) -> str | None:
    """Return, in words, how the figure must be read to agree with a computed number; None if no reading agrees.

    An empty string means: as printed. Other readings take MB for MiB, or take the figure's digits as cut off instead of
    rounded. most: if given, the computed number is a range from `value` to `most`, and one reading must agree with all
    numbers in this range.
    """
    agreeing = conventions(printed, value, rounding, most)
    return next((words for one, words in agreeing.items() if not one.cut or _may_be_cut(printed, rounding)), None)


def conventions(
    printed: Printed, value: Fraction, rounding: Rounding, most: Fraction | None = None
) -> dict[FigureConvention, str]:
    """Return each convention by which the figure agrees with a computed number -> this convention in words.

    Unlike `agrees`, also read figures of few digits, such as `1x`, as cut off. most: see `agrees`.
    """
    ends = [value, value if most is None else most]  # agreeing numbers form an interval, so its ends suffice
    readings = [(convention, *_read(printed, rounding, convention)) for convention in CONVENTIONS]
    return {
        convention: words for convention, words, one, rule in readings if all(_matches(one, end, rule) for end in ends)
    }


def undecided(printed: Printed, value: Fraction, rounding: Rounding, most: Fraction) -> bool:
    """Return whether the figure agrees with some numbers between `value` and `most`, but not with all of them.

    The figure is read in the same ways as in `agrees`.
    """
    if agrees(printed, value, rounding, most) is not None:
        return False
    return any(
        _matches(one, value, rule) or _matches(one, most, rule) or (not one.relation and value < one.number < most)
        for convention in CONVENTIONS
        if not convention.cut or _may_be_cut(printed, rounding)
        for _, one, rule in [_read(printed, rounding, convention)]
    )


def _may_be_cut(printed: Printed, rounding: Rounding) -> bool:
    """Return whether a figure has enough digits that their cutting off explains a computed number.

    A cut figure covers all numbers up to the next figure, `1x` nearly up to 2x. Below 4 units that is too much.
    """
    return rounding.rule == "nearest" and not printed.relation and abs(printed.number) >= 4 * printed.last


def _read(printed: Printed, rounding: Rounding, convention: FigureConvention) -> tuple[str, Printed, Rounding]:
    """Return a convention in words, and the figure and its rule as read by this convention."""
    words = []
    if convention.cut and rounding.rule == "nearest" and not printed.relation:
        words, rounding = [_CUT], Rounding("cut")
    binary = f"{printed.unit[:1]}iB"
    if convention.binary and printed.dimension == "bytes" and binary in _BYTES and printed.unit != binary:
        factor = _BYTES[binary] / UNITS["bytes"][printed.unit]
        words.append(f"{printed.unit} read as {binary}")
        printed = replace(printed, number=printed.number * factor, last=printed.last * factor, unit=binary)
    return "; ".join(words), printed, rounding


def _matches(printed: Printed, value: Fraction, rounding: Rounding) -> bool:
    if printed.relation:
        n = printed.number
        return {"<": value < n, "<=": value <= n, ">": value > n, ">=": value >= n}[printed.relation]
    error = value - printed.number
    match rounding.rule:
        case "nearest":
            return abs(error) * 2 <= printed.last
        case "cut":
            return 0 <= error < printed.last if printed.number >= 0 else -printed.last < error <= 0
        case "about":
            return abs(error) <= abs(printed.number) * rounding.within
        case "magnitude":
            same_sign = value * printed.number > 0
            return same_sign and _power(abs(value)) == _power(abs(printed.number))


def _power(value: Fraction) -> int:
    """Return the exponent of the power of ten that is nearest to `value` on a logarithmic scale."""
    return round(math.log10(value))


def shown(value: Fraction, dimension: Dimension, unit: str = "") -> str:
    """Return a computed number as text.

    unit: the unit of the printed figure. It is used only for counts and times.
    """
    exact = f"{int(value):,}" if value.denominator == 1 else f"{float(value):.6g}"
    if dimension == "bytes":
        one = next((u for u in ("TB", "GB", "MB", "KB") if abs(value) >= _BYTES[u]), "B")
        if one == "B":
            return f"{float(value):,.6g} B"
        two = f"{one[0]}iB"
        return f"{float(value / _BYTES[one]):.4g} {one} = {float(value / _BYTES[two]):.4g} {two}"
    if dimension == "count" and UNITS["count"].get(unit, 1) > 1:
        return f"{exact} ({float(value / UNITS['count'][unit]):.6g}{unit})"
    if dimension == "share":
        return f"{float(value * 100):.6g}%"
    if dimension == "seconds":
        return f"{float(value / UNITS['seconds'].get(unit, Fraction(1))):.4g} {unit or 's'}"
    return exact + {"ratio": "x", "bits": " bit", "rate": " tokens/s"}.get(dimension, "")
