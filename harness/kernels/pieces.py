"""Work on a large tensor by pieces that stay in the cache, each thread at its own.

An operation of torch that it splits among threads ends when the slowest has: with a hundred such ends per call, another
busy process on the machine makes the whole ten times slower. Pieces of fewer values than torch splits need no such ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

VALUES = 3 << 13
"""How many values are worked on at a time, fewer than the 32768 from which torch splits an operation."""
_WORTH_A_THREAD = 1 << 20
"""Values from which a thread earns more than its start."""
_THREADS = 4
"""More would wait for Python's lock, which each holds for a third of the time."""


def for_each(work: Callable[..., None], pieces: Sequence[tuple[Any, ...]], values: int) -> None:
    """Call work(*piece) for each of `pieces`, which have `values` values in all, in order or at the same time."""
    threads = min(torch.get_num_threads(), _THREADS, values // _WORTH_A_THREAD)
    if threads < 2:
        return _one_by_one(work, pieces, torch.is_inference_mode_enabled())
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
