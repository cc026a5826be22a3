"""A figure as a paper prints it, and whether a computed number comes out as it. Exact fractions, no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

from harness.errors import did_you_mean

Dimension = Literal["count", "bytes", "bits", "share", "ratio", "seconds", "rate", "number", "property"]
"""What a measure is in. count: of things; share: of a whole; rate: tokens a second; property: it holds or it does not, and
nothing is printed."""

_THOUSANDS: dict[str, Fraction] = {"K": Fraction(10**3), "M": Fraction(10**6), "B": Fraction(10**9)}
_BYTES: dict[str, Fraction] = {
    f"{prefix}{end}": Fraction(base**power)
    for power, prefix in enumerate("KMGT", start=1)
    for end, base in (("B", 1000), ("iB", 1024))
}
# A bare letter is a paper's shorthand for the decimal unit, and is read as the binary one only where that is said.
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
"""Of a number; so few that none can be written to stop the machine."""
_FORM = re.compile(rf"(?P<relation><=|>=|<|>)?\s*(?P<digits>{_DIGITS})\s*(?P<unit>[A-Za-z%/]*)")
_NUMBER = re.compile(rf"{_DIGITS}(?:/[0-9]{{1,30}})?%?")


@dataclass(frozen=True)
class Printed:
    """A printed figure. number: in base units (1, byte, second); last: what one in its last digit is worth.

    unit: as printed; relation: "", or what ours must be to it (`<`, `<=`, `>`, `>=`).
    """

    text: str
    number: Fraction
    last: Fraction
    unit: str
    relation: str = ""
    dimension: Dimension = "number"


@dataclass(frozen=True)
class Rounding:
    """How the figure was made of the true one: `nearest`, `cut` (digits dropped), `magnitude` (a power of ten), `about`.

    within: of `about`, the largest share of the printed figure that ours may be away from it.
    """

    rule: Literal["nearest", "cut", "magnitude", "about"] = "nearest"
    within: Fraction = Fraction(0)

    @property
    def words(self) -> str:
        """What a number must be to come out by it, in words; empty of `nearest`, where it rounds to the figure."""
        if self.rule == "about" and self.within:
            return f"within {shown(self.within, 'share')} of what is printed"
        return RULES[self.rule]


_CUT = "digits cut off, not rounded"
RULES = {
    "nearest": "", "cut": _CUT, "magnitude": "of the same order of magnitude, by the nearest power of ten",
    "about": "exactly what is printed",
}  # fmt: skip
"""The rules of Rounding in words; `about` as it is within 0%."""
NEAREST = Rounding()


def parse(text: str, dimension: Dimension) -> Printed:
    """Read a figure such as `0.3M`, `< 48 GB` or `10,000x`. Raises ValueError: what is wrong; and the mend after a `;`."""
    units = UNITS[dimension]
    found = _FORM.fullmatch(text.strip())
    if found is None:
        raise ValueError(f"{text!r} is no figure; write e.g. {_example(dimension)}, or < and > before it")
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
    """Return a number as it is written, e.g. `1.5e6`, `2/3`, `20%`; None for what is none, or has no end."""
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
    """Return what was written as a message can quote it."""
    text = repr(written)
    return text if len(text) <= _QUOTED else f"{text[: _QUOTED - 4]} ..."


def agrees(printed: Printed, value: Fraction, rounding: Rounding, most: Fraction | None = None) -> str | None:
    """Say under which reading of the figure a number comes out as it; "" is the plain one, None that it does under none.

    Besides the plain reading: MB read as MiB, and digits cut off where they should have been rounded.
    most: where the number is only known to lie in value..most; then all of that must come out, under one reading.
    """
    ends = [value, value if most is None else most]  # what comes out is an interval: its ends speak for the rest
    for words, one, rule in _readings(printed, rounding):
        if all(_comes_out(one, end, rule) for end in ends):
            return words
    return None


def undecided(printed: Printed, value: Fraction, rounding: Rounding, most: Fraction) -> bool:
    """Say whether some of value..most comes out as the figure under some reading, and some does not."""
    if agrees(printed, value, rounding, most) is not None:
        return False
    return any(
        _comes_out(one, value, rule) or _comes_out(one, most, rule) or (not one.relation and value < one.number < most)
        for _, one, rule in _readings(printed, rounding)
    )


def _readings(printed: Printed, rounding: Rounding) -> Iterator[tuple[str, Printed, Rounding]]:
    for words, one in _units(printed):
        yield words, one, rounding
    # A cut figure stands for all up to the next one: 1x for nearly 2x. More than a quarter of itself explains nothing.
    if rounding.rule == "nearest" and not printed.relation and abs(printed.number) >= 4 * printed.last:
        for words, one in _units(printed):
            yield "; ".join(filter(None, [_CUT, words])), one, Rounding("cut")


def _units(printed: Printed) -> Iterator[tuple[str, Printed]]:
    yield "", printed
    binary = f"{printed.unit[:1]}iB"
    if printed.dimension == "bytes" and binary in _BYTES and printed.unit != binary:
        factor = _BYTES[binary] / UNITS["bytes"][printed.unit]
        if UNITS["bytes"][printed.unit] > 1 and not printed.unit.endswith("iB"):
            words = f"{printed.unit} read as {binary}"
            yield words, replace(printed, number=printed.number * factor, last=printed.last * factor, unit=binary)


def _comes_out(printed: Printed, value: Fraction, rounding: Rounding) -> bool:
    if printed.relation:
        n = printed.number
        return {"<": value < n, "<=": value <= n, ">": value > n, ">=": value >= n}[printed.relation]
    away = value - printed.number
    match rounding.rule:
        case "nearest":
            return abs(away) * 2 <= printed.last
        case "cut":
            return 0 <= away < printed.last if printed.number >= 0 else -printed.last < away <= 0
        case "about":
            return abs(away) <= abs(printed.number) * rounding.within
        case "magnitude":
            same_sign = value * printed.number > 0
            return same_sign and _power(abs(value)) == _power(abs(printed.number))


def _power(value: Fraction) -> int:
    """Return the nearest power of ten, on the scale of logarithms."""
    return round(math.log10(value))


def shown(value: Fraction, dimension: Dimension, unit: str = "") -> str:
    """Return a computed number for people: in the printed figure's unit, and exactly where that says more."""
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
