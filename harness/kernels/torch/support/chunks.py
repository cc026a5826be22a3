"""Work on a large tensor by pieces that stay in the cache, each thread at its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

_FEW, _MANY = 1 << 19, 3 << 13
"""How many values to take at a time of a small tensor, in a few pieces that torch splits among its threads, and of a large
one, in many that it does not, being fewer than 32768. An operation that is split ends when the slowest thread has: with a
hundred such ends in a call, another busy process on the machine makes it ten times slower."""
_LARGE = 1 << 21
"""Values from which threads of our own earn more than their start."""
_THREADS = 4
"""More would wait for Python's lock, which each holds for a third of the time."""


def size(values: int, device: torch.device) -> int:
    """Return how many of so many values to take at a time: on a GPU, all."""
    if device.type != "cpu":
        return max(values, 1)
    return _MANY if values >= _LARGE else _FEW


def for_each(work: Callable[..., None], pieces: Sequence[tuple[Any, ...]], values: int) -> None:
    """Call work(*piece) for each of `pieces`, which have `values` values in all, in order or at the same time."""
    threads = min(torch.get_num_threads(), _THREADS, len(pieces)) if values >= _LARGE else 1
    if threads < 2:
        _one_by_one(work, pieces, torch.is_inference_mode_enabled())
        return
    share, inference = -(-len(pieces) // threads), torch.is_inference_mode_enabled()
    with ThreadPoolExecutor(threads) as pool:
        shares = [pieces[first : first + share] for first in range(0, len(pieces), share)]
        for done in [pool.submit(_one_by_one, work, mine, inference) for mine in shares]:
            done.result()


def _one_by_one(work: Callable[..., None], pieces: Sequence[tuple[Any, ...]], inference: bool) -> None:
    # These modes are each thread's own, and what inference mode made only it may write to.
    with torch.inference_mode(inference), torch.no_grad():
        for piece in pieces:
            work(*piece)
