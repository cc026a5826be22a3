"""Sizes of memory as people write them: `24GiB` and `24GB` are two numbers, 7 % apart, and are never mixed up."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {
    "GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TiB": 2**40, "TB": 10**12, "KiB": 2**10, "kB": 10**3,
}  # fmt: skip
_FORM = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[A-Za-z]*)\s*", re.ASCII)
DIGITS, _MOST = 20, 2**60
"""Digits of a size as it is written, and bytes; no machine has more."""


@dataclass(frozen=True)
class MemorySize:
    """A number of bytes, and the unit in which it is answered: that in which it was asked for, but GiB for TiB."""

    number_B: int
    unit: str

    def shown(self, number_B: int) -> str:
        """Write another number of bytes in the same unit, without its name: to three digits or two places."""
        value = number_B / UNITS[self.unit]
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def parse_size(text: str) -> MemorySize:
    """Read `24GiB` or `24 GB`. Raises ValueError, which says what to write, for anything that is not plainly a size."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size of memory; write a number and its unit: 24GiB or 24GB")
    number, unit = match["number"], match["unit"]
    if len(number) > DIGITS:
        raise ValueError(f"{number[:DIGITS]}... is no size that a machine can have; write e.g. 24GiB")
    if unit not in UNITS:
        raise ValueError(_which(number, unit))
    found = int(float(number) * UNITS[unit])
    if not 0 < found <= _MOST:
        raise ValueError(f"{text!r} is no size that a machine can have; write e.g. 24GiB")
    return MemorySize(found, unit.replace("T", "G"))  # two places of a TB would show no adapter


def _which(number: str, unit: str) -> str:
    """Say what a size with a wrong unit, or with none, may have meant."""
    letter = unit[:1].upper()
    if unit.lower() in ("k", "m", "g", "t", "") or unit.lower() in {known.lower() for known in UNITS}:
        letter = letter or "G"
        two, ten = next((u, UNITS[u]) for u in UNITS if u.upper() == f"{letter}IB"), UNITS
        decimal = next(u for u in UNITS if u.upper() == f"{letter}B")
        as_two, as_ten = int(float(number) * two[1]), int(float(number) * ten[decimal])
        return (
            f"`{number}{unit}` may be {number}{two[0]} ({as_two:,} bytes) or {number}{decimal} ({as_ten:,} bytes); write "
            f"one of the two, in these letters"
        )
    return f"`{unit}` is no unit of memory; write one of {', '.join(UNITS)}"
