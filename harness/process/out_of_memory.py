"""Recognise out-of-memory errors of all libraries. Imports no torch: torch's errors are recognised by their names."""

from __future__ import annotations

import errno
import re
from dataclasses import dataclass
from typing import Literal

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40, "P": 2**50, "E": 2**60}
_SIZE = r"([\d.]+) ?(?:bytes|([KMGTPE]?)i?B)"
_DEVICE = re.compile(
    rf"(?:CUDA|HIP) out of memory(?:\. Tried to allocate {_SIZE})?|(?:CUDA|HIP) error: out of memory"
    rf"|Tried to allocate {_SIZE}|C?UBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
_HOST = re.compile(
    # Messages of torch, numpy and C++, and two forms of the operating system's message: mmap's and Rust's.
    rf"DefaultCPUAllocator: .*?tried to allocate {_SIZE}|Unable to allocate {_SIZE} for an array"
    r"|std::bad_alloc|Cannot allocate memory|\(os error 12\)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Shortage:
    """The memory that ran out, and the allocation that failed."""

    where: Literal["host", "device"]
    requested_B: int | None = None
    """Size of the failed allocation; None if the error does not name it."""


def shortage(error: BaseException) -> Shortage | None:
    """Return which memory ran out and the size of the allocation, or None if `error` has another cause."""
    text = str(error)
    if device := _DEVICE.search(text):
        return Shortage("device", _size(device))
    if type(error).__name__ == "OutOfMemoryError":
        return Shortage("device")
    if host := _HOST.search(text):
        return Shortage("host", _size(host))
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return Shortage("host")
    return None


def _size(found: re.Match[str]) -> int | None:
    """Return the size in bytes that an error message names. If it names none, return None.

    The groups of `found` are pairs (number, unit).
    """
    pairs = zip(found.groups()[::2], found.groups()[1::2], strict=True)
    return next((int(float(number) * _UNITS[unit or ""]) for number, unit in pairs if number), None)
