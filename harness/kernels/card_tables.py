"""Tables of what is faster on a card: crossovers, and tiles of matrix products.

A table is a JSON file in `crossovers/`: `default.json`, or a file with the name of a card (see `file_name`) that
`peft-harness bench --crossovers` has measured. The environment variable PEFT_HARNESS_CROSSOVERS names a folder whose
tables come first. So a measured table can be tried without changing the package. This module imports no torch.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VARIABLE = "PEFT_HARNESS_CROSSOVERS"
DEFAULT = "default.json"
"""Name of the table for cards that have none. It has every crossover, and no tiles."""
CROSSOVERS = {"nf4_linear": "tokens", "multi_lora_linear": "tokens_per_adapter", "lora_linear": "rank"}
"""Operation -> the size for which its crossover is stated."""
TILES = "tiles"
_KEYS = ("card", "torch", "triton", *CROSSOVERS, TILES)
PACKAGED = Path(__file__).with_name("crossovers")
"""Folder of the tables of this package. A kit and an installed package have their own."""
_HINT = "measure the card again by `peft-harness bench --crossovers --out DIR`, or remove the file"


@dataclass(frozen=True, eq=False)
class Entry:
    """A value of a table and its place, so that a mistake is reported with its file and key."""

    file: Path
    key: str
    """Path to the value, such as `lora_linear.rows[1].rank`. Empty for the whole table."""
    value: Any

    def wrong(self, expected: str) -> ValueError:
        """Return the error for a value that is not as `expected`."""
        got = repr(self.value)[:80]
        return ValueError(f"{self.file}: {self.key or 'table'}: must be {expected}, got {got}; hint: {_HINT}")

    def __contains__(self, name: str) -> bool:
        return isinstance(self.value, dict) and name in self.value

    def __getitem__(self, name: str) -> Entry:
        """Return the value of a key. Raises ValueError if this is not an object with the key."""
        if name not in self:
            raise self.wrong(f"an object with the key {name!r}")
        return Entry(self.file, f"{self.key}.{name}".lstrip("."), self.value[name])

    def items(self) -> list[Entry]:
        """Return the values of a list. Raises ValueError if this is no list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Entry(self.file, f"{self.key}[{at}]", one) for at, one in enumerate(self.value)]

    def integer(self, least: int = 0) -> int:
        """Return the value as an integer. Raises ValueError if it is none, or smaller than `least`."""
        if type(self.value) is not int or self.value < least:
            raise self.wrong(f"an integer of at least {least}")
        return self.value

    def check_keys(self, known: Collection[str]) -> None:
        """Raise ValueError unless this is an object, and all its keys are known."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        for name in self.value.keys() - set(known):
            raise ValueError(f"{self.file}: {name}: is not a key of a table: {', '.join(known)}; hint: {_HINT}")


def file_name(card: str) -> str:
    """Return the name of a card's table, e.g. `nvidia-h100-80gb-hbm3.json`. card: empty for a CPU, which is `cpu.json`."""
    return f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-') or 'cpu'}.json"


@cache
def card(device: torch.device) -> str:
    """Return the name of a GPU, as its driver says it. For any other device, return an empty string."""
    import torch  # late, because `night` names cards and starts fast

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


@cache
def tables(on: str) -> tuple[Entry, ...]:
    """Return the tables for a card, the first one to ask first and the default last.

    They and the variable are read once per process, because every call of a kernel asks.

    on: name of the card. Empty for a CPU: Triton's interpreter then reads `cpu.json` in the folder of the variable, for
    tests and rehearsals. Raises ValueError for a table that is not JSON, or that has an unknown key.
    """
    return tuple(read(file) for file in _files(on) if file.is_file())


def _files(on: str) -> Iterator[Path]:
    if folder := os.environ.get(VARIABLE):
        yield Path(folder) / file_name(on)
    yield PACKAGED / file_name(on)
    yield PACKAGED / DEFAULT


def read(file: Path) -> Entry:
    """Return the table in a file. Raises ValueError if it is not JSON, or has an unknown key."""
    try:
        table = Entry(file, "", json.loads(file.read_bytes()))
    except ValueError as error:
        raise ValueError(f"{file}: is not JSON: {error}; hint: {_HINT}") from error
    table.check_keys(_KEYS)
    return table
