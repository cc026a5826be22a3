"""Fresh memory for a large result, in huge pages where the system has them: its page faults cost more than filling it."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

_OWN_MAPPING = 32 << 20
"""From this size on (bytes) glibc gives every allocation a mapping of its own, so that advice on it concerns nobody else."""


@cache
def _advise() -> Callable[..., Any] | None:
    """Return the C library's madvise, or None where there are no transparent huge pages to be asked for."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return an uninitialised contiguous tensor, as torch.empty does.

    On a CPU 64 MiB are 16384 pages, which one by one take the system 30 to 60 ms to hand out, and 2 MiB at a time 11 to 15;
    decoding into them takes less than either. Advice that is not followed changes nothing.
    """
    out = torch.empty(tuple(shape), dtype=dtype, device=device)
    bytes_ = out.numel() * out.element_size()
    if out.device.type == "cpu" and bytes_ >= _OWN_MAPPING and (advise := _advise()) is not None:
        first = -(-out.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(first, out.data_ptr() + bytes_ - first, mmap.MADV_HUGEPAGE)
    return out
