"""Parse and format sizes of memory. `24GiB` and `24GB` differ by 7 %."""

from __future__ import annotations

import re
from dataclasses import dataclass

UNITS = {
    "GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6, "TiB": 2**40, "TB": 10**12, "KiB": 2**10, "kB": 10**3,
}  # fmt: skip
_FORM = re.compile(r"\s*(?P<number>\d+(?:\.\d+)?|\.\d+)\s*(?P<unit>[A-Za-z]*)\s*", re.ASCII)
DIGITS, _MAX_B = 20, 2**60
"""Largest number of digits and largest number of bytes of a valid size."""


@dataclass(frozen=True)
class MemorySize:
    """A number of bytes, and the unit in which to show it.

    The unit is the user's, except that GiB replaces TiB, and GB replaces TB.
    """

    number_B: int
    unit: str

    def shown(self, number_B: int) -> str:
        """Format `number_B` bytes in this object's unit, without the unit's name.

        Smaller numbers get more decimals, up to two.
        """
        value = number_B / UNITS[self.unit]
        return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def parse_size(text: str) -> MemorySize:
    """Parse a size such as `24GiB` or `24 GB`, and return it. Raises ValueError with a hint for any other text."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size of memory; write a number and its unit: 24GiB or 24GB")
    number, unit = match["number"], match["unit"]
    if len(number) > DIGITS:
        raise ValueError(f"{number[:DIGITS]}... is no size that a machine can have; write e.g. 24GiB")
    if unit not in UNITS:
        raise ValueError(_which(number, unit))
    found = int(float(number) * UNITS[unit])
    if not 0 < found <= _MAX_B:
        raise ValueError(f"{text!r} is no size that a machine can have; write e.g. 24GiB")
    return MemorySize(found, unit.replace("T", "G"))  # in TB, two decimals would show an adapter as 0.00


def _which(number: str, unit: str) -> str:
    """Return an error message for a size with a wrong or missing unit. It lists the units to choose from."""
    if unit.lower() not in ("k", "m", "g", "t", "", *(name.lower() for name in UNITS)):
        return f"`{unit}` is no unit of memory; write one of {', '.join(UNITS)}"
    letter = (unit or "G")[0].upper()
    names = [name for name in UNITS if name[0].upper() == letter]
    meanings = " or ".join(f"{number}{name} ({int(float(number) * UNITS[name]):,} bytes)" for name in names)
    return f"`{number}{unit}` may be {meanings}; write one of the two, in these letters"
