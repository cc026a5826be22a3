"""Process a large tensor in pieces that fit the cache, with several threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_FEW, _MANY = 1 << 19, 3 << 13
"""Number of values per piece of a small tensor (`_FEW`) and of a large tensor (`_MANY`).

A small tensor has few pieces, and torch splits each piece among its threads. A large tensor has many pieces, of fewer
than 32768 values each, so that torch does not split them. A split operation waits for the slowest thread. With a
hundred such waits per call, another busy process on the machine makes the call ten times slower.
"""
_LARGE = 1 << 21
"""Smallest number of values for which our own threads are faster than torch's, even with the time to start them."""
_THREADS = 4
"""Largest number of our own threads.

Each thread holds Python's lock for a third of the time, so further threads would wait for the lock.
"""


def size(values: int, device: torch.device) -> int:
    """Return the number of values per piece of a tensor with `values` values. On a GPU, one piece has all values."""
    if device.type != "cpu":
        return max(values, 1)
    return _MANY if values >= _LARGE else _FEW


def for_each(work: Callable[..., None], pieces: Sequence[tuple[Any, ...]], values: int) -> None:
    """Call work(*piece) for each piece: in order, or in several threads if `values` is large.

    values: number of values in all pieces.
    """
    threads = min(torch.get_num_threads(), _THREADS, len(pieces)) if values >= _LARGE else 1
    if threads < 2:
        _run_all(work, pieces, torch.is_inference_mode_enabled())
        return
    share, inference = -(-len(pieces) // threads), torch.is_inference_mode_enabled()
    with ThreadPoolExecutor(threads) as pool:
        shares = [pieces[first : first + share] for first in range(0, len(pieces), share)]
        for future in [pool.submit(_run_all, work, one, inference) for one in shares]:
            future.result()


def _run_all(work: Callable[..., None], pieces: Sequence[tuple[Any, ...]], inference: bool) -> None:
    # Grad and inference mode are per thread, and only inference mode may write to tensors that were made in it.
    with torch.inference_mode(inference), torch.no_grad():
        for piece in pieces:
            work(*piece)
