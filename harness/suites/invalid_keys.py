"""What of a suite's entries is not known, because it was taken out as wrong: its absence is no second mistake."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from harness.suites.schema import is_entry
from harness.yaml_lines import Document, KeyPath


class Cuts:
    """What was cut of one entry; `ways` start from it."""

    def __init__(self, ways: set[KeyPath]) -> None:
        self.ways = ways

    def hold(self, *key: str) -> bool:
        """Say whether a value is not known at all: it, or what it would stand in, was cut."""
        return any(key[:length] in self.ways for length in range(len(key) + 1))

    def touch(self, *key: str) -> bool:
        """Say whether a value is not known in whole: it is held, or a part of it was cut."""
        return self.hold(*key) or any(way[: len(key)] == key for way in self.ways)

    @property
    def leave_defaults(self) -> bool:
        """Whether a default stands where something else was meant; of an axis, the other values are still there."""
        return any(not way or isinstance(way[-1], str) for way in self.ways)


class CutsOfEntries:
    """What was cut of a suite, by entry."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._inside: dict[KeyPath, set[KeyPath]] = defaultdict(set)
        self._lost: set[KeyPath] = set()
        for way in document.cut:
            # Another cell's mistake lies inside the block too, and is none of the block's own.
            length = next((n for n in range(len(way), 0, -1) if is_entry(way[:n])), 0)
            self._inside[way[:length]].add(way[length:])
            if "method" in way[-2:] or is_entry(way):
                self._lost.add(way[:2])

    def of(self, block: KeyPath, cell: KeyPath) -> Cuts:
        """Return what was cut of the entry at `cell` in the block at `block`, and not overridden in it."""
        own = self._document.at(cell)
        shared = {way for way in self._inside[block] if way != ("cells",) and not _overrides(own, way)}
        around = {() for way in self._inside[()] if cell[: len(way)] == way}
        return Cuts(self._inside[cell] | shared | around if cell != block else self._inside[cell] | around)

    def lose_methods(self, block: KeyPath) -> bool:
        """Say whether a Method of any entry of a block was cut."""
        return block in self._lost


def _overrides(cell: Any, way: KeyPath) -> bool:
    """Say whether a cell has a value of its own where its block has one."""
    for part in way:
        if not isinstance(cell, dict):
            return True
        if part not in cell:
            return False
        cell = cell[part]
    return not isinstance(cell, dict)
