"""Tables of measured tuning values for each card (GPU): crossovers, and tiles of matrix products.

A crossover is the largest size for which an Operation uses its fused kernel; see `harness.kernels.crossover`. A tile is
the part of a matrix product that one program of a kernel computes. A table is a JSON file in `crossovers/`.
`default.json` is for every card. `peft-harness bench --crossovers --out DIR` measures a card, and writes the card's
table, such as `nvidia-h100-80gb-hbm3.json`. To try a new table without changing the package, set the environment
variable PEFT_HARNESS_CROSSOVERS to its folder: tables in this folder take precedence. This module imports no torch.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

VARIABLE = "PEFT_HARNESS_CROSSOVERS"
DEFAULT = "default.json"
"""File name of the default table, which has every crossover and no tiles.

If a card's own table lacks a crossover, the default table gives it.
"""
CROSSOVERS = {"nf4_linear": "tokens", "multi_lora_linear": "tokens_per_adapter", "lora_linear": "rank"}
"""Operation -> the size that is compared with its crossover. A table's rows have the crossover under this name."""
TILES = "tiles"
_KEYS = ("card", "torch", "triton", *CROSSOVERS, TILES)
PACKAGED = Path(__file__).with_name("crossovers")
"""Folder with the tables that are part of the package."""
_HINT = "measure the card again by `peft-harness bench --crossovers --out DIR`, or remove the file"


@dataclass(frozen=True, eq=False)
class Entry:
    """A JSON value in a table. Error messages name its file and its key."""

    file: Path
    key: str
    """Path to the value, such as `lora_linear.rows[1].rank`. Empty for the whole table."""
    value: Any

    def wrong(self, expected: str) -> ValueError:
        """Return the error for a wrong value. expected: a description of right values, such as `a list`."""
        got = repr(self.value)[:80]
        return ValueError(f"{self.file}: {self.key or 'table'}: must be {expected}, got {got}; hint: {_HINT}")

    def __contains__(self, name: str) -> bool:
        return isinstance(self.value, dict) and name in self.value

    def __getitem__(self, name: str) -> Entry:
        """Return the entry under a key. Raises ValueError if this entry is not a JSON object, or lacks the key."""
        if name not in self:
            raise self.wrong(f"an object with the key {name!r}")
        return Entry(self.file, f"{self.key}.{name}".lstrip("."), self.value[name])

    def items(self) -> list[Entry]:
        """Return the items of a JSON list as entries. Raises ValueError if this entry is not a list."""
        if not isinstance(self.value, list):
            raise self.wrong("a list")
        return [Entry(self.file, f"{self.key}[{at}]", one) for at, one in enumerate(self.value)]

    def integer(self, least: int = 0) -> int:
        """Return the value. Raises ValueError unless it is an integer of at least `least`."""
        if type(self.value) is not int or self.value < least:
            raise self.wrong(f"an integer of at least {least}")
        return self.value

    def check_keys(self, known: Collection[str]) -> None:
        """Raise ValueError unless this entry is a JSON object that has only keys in `known`."""
        if not isinstance(self.value, dict):
            raise self.wrong("an object")
        for name in self.value.keys() - set(known):
            where, what = f"{self.key}.{name}".lstrip("."), f"{self.key or 'a table'} may have {', '.join(known)}"
            raise ValueError(f"{self.file}: {where}: unknown key; {what}; hint: {_HINT}")

    def check_distinct(self, keys: Sequence[object], what: str) -> None:
        """Raise ValueError if two items of this list have the same key.

        keys: the key of each item. what: name of the key in the error message.
        """
        for at, key in enumerate(keys):
            if key in keys[:at]:
                raise self.items()[at].wrong(f"a row with another {what} than row {keys.index(key)}")


def file_name(card: str) -> str:
    """Return the file name of a card's table, such as `nvidia-h100-80gb-hbm3.json`.

    card: name of the GPU, or empty for the CPU, whose table is `cpu.json`.
    """
    return f"{re.sub('[^a-z0-9]+', '-', card.lower()).strip('-') or 'cpu'}.json"


@cache
def card(device: torch.device) -> str:
    """Return the name of a GPU as its driver reports it. For any other device, return an empty string."""
    import torch  # late, because `night` names cards and starts fast

    return torch.cuda.get_device_name(device) if device.type == "cuda" else ""


_only: tuple[Entry, ...] | None = None
"""Tables that the context `only_tables` has set. None outside of this context."""


@contextmanager
def only_tables(*only: Entry) -> Iterator[None]:
    """Inside the context, let kernels on every card read only the given tables and `default.json`.

    Measurements use this context. An older table for the card then has no effect on them, even if it has mistakes.
    """
    global _only
    before, _only = _only, only
    tables.cache_clear()
    try:
        yield
    finally:
        _only = before
        tables.cache_clear()


@cache
def tables(on: str) -> tuple[Entry, ...]:
    """Return the tables for a card in the order of precedence. The default table comes last.

    on: name of the card, or empty for the CPU. The CPU's table, `cpu.json`, is for Triton's interpreter.

    The files and the variable PEFT_HARNESS_CROSSOVERS are read once per process, because every call of a kernel needs
    the tables. If the variable names a folder without a table for the card, a RuntimeWarning says so. Raises ValueError
    for a table that is not JSON, is of another card, or has an unknown key.
    """
    found = [_of_card(file, on) for file in _files(on) if file.is_file()] if _only is None else _only
    return (*found, read(PACKAGED / DEFAULT))


def _files(on: str) -> Iterator[Path]:
    if folder := os.environ.get(VARIABLE):
        file = Path(folder) / file_name(on)
        if not file.is_file():
            hint = "name the folder that `peft-harness bench --crossovers --out DIR` has written on this card"
            warnings.warn(f"{VARIABLE} has no effect: there is no {file}; hint: {hint}", RuntimeWarning, stacklevel=2)
        yield file
    yield PACKAGED / file_name(on)


def _of_card(file: Path, on: str) -> Entry:
    table = read(file)
    if "card" in table and table["card"].value != on:
        raise table["card"].wrong(f"{on!r}, the card that reads this table")
    return table


def read(file: Path) -> Entry:
    """Return the table in a file. Raises ValueError if it is no JSON object, has an unknown key, or has a key twice."""
    try:
        value = json.loads(file.read_bytes(), object_pairs_hook=lambda pairs: _object(file, pairs))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: is not JSON: {error}; hint: {_HINT}") from error
    table = Entry(file, "", value)
    table.check_keys(_KEYS)
    return table


def _object(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{file}: {twice}: the same object has this key twice; hint: {_HINT}")
    return made
