"""Find and load the pages of mapped files, such as libraries, that are in a process's memory. Linux only.

A fork starts without its parent's pages of files, and gets each page only when it uses the page. A measurement of
memory in the fork would include pages that appear later, so the fork loads all of them at its start.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable
from pathlib import Path

Range = tuple[int, int]
"""First address, and number of bytes."""

_ENTRY_B = 8
_PRESENT = 0x80
"""Bit that marks a page in memory, in the last byte of its entry in /proc/self/pagemap."""
_POPULATE_READ = 22
"""MADV_POPULATE_READ of Linux 5.14 and later: read the pages as if each had been used."""


def resident(maps: Path = Path("/proc/self/maps"), pagemap: Path = Path("/proc/self/pagemap")) -> list[Range]:
    """Return the ranges of mapped files that are in this process's memory. Raises OSError if /proc does not list them."""
    found: list[Range] = []
    with pagemap.open("rb", buffering=0) as entries:
        for line in maps.read_text(errors="replace").splitlines():
            addresses, rights, _, _, inode, *_ = line.split(maxsplit=5)
            if inode == "0" or "r" not in rights:
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            entries.seek(start // mmap.PAGESIZE * _ENTRY_B)
            flags = entries.read((end - start) // mmap.PAGESIZE * _ENTRY_B)[_ENTRY_B - 1 :: _ENTRY_B]
            found += [(start + first * mmap.PAGESIZE, count * mmap.PAGESIZE) for first, count in _present(flags)]
    return found


def _present(flags: bytes) -> Iterable[Range]:
    """Yield (first page, number of pages) of each sequence of pages in memory. flags: one byte per page."""
    first = None
    for number, flag in enumerate(flags):
        if flag & _PRESENT:
            first = number if first is None else first
        elif first is not None:
            yield first, number - first
            first = None
    if first is not None:
        yield first, len(flags) - first


def populate(ranges: Iterable[Range]) -> None:
    """Bring pages of mapped files into this process's memory. Raises OSError if the kernel is older than Linux 5.14."""
    advise = ctypes.CDLL(None, use_errno=True).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    for start, length in ranges:
        if advise(start, length, _POPULATE_READ):
            number = ctypes.get_errno()
            raise OSError(number, "the kernel does not populate pages of files")
