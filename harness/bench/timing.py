"""Time two alternating programs, A B, B A, A B ..., so that a slow phase of the machine affects both alike."""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch

from harness.bench.results import Samples

Run = Callable[[], object]

WARMUP = 3
"""Calls before the samples."""
LEAST_S = 0.005
"""Shortest duration of a sample on a CPU; the sample is the mean of the calls in it."""
MOST_CALLS = 1000
"""Most calls in a sample."""
FLUSH_B = 256 * 2**20
"""Bytes written to flush the L2 cache: more than any holds."""
HEAD_START = 2_000_000
"""Cycles, about a millisecond, that the GPU waits before a timed call while the host queues it. Queueing takes up to half of
that, longer than flushing the cache; without the wait a small call would be timed by the host's speed."""


class Clock:
    """Timer of calls on a device: CUDA events on a GPU, one call each with a cold L2 cache; the wall clock on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self._flush = torch.empty(FLUSH_B // 4, dtype=torch.int32, device=device) if self.on_gpu else None

    def sample(self, run: Run, calls: int = 1) -> float:
        """Return the seconds per call, the mean over `calls`."""
        if self._flush is not None:
            return sum(self._event(run, self._flush) for _ in range(calls)) / calls
        started = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - started) / calls

    def calls(self, seconds: float) -> int:
        """Return the calls per sample for a call of this many seconds."""
        return 1 if self.on_gpu else max(1, min(MOST_CALLS, math.ceil(LEAST_S / max(seconds, 1e-9))))

    def _event(self, run: Run, flush: torch.Tensor) -> float:
        begin: Any = torch.cuda.Event(enable_timing=True)
        end: Any = torch.cuda.Event(enable_timing=True)
        flush.zero_()
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1e3


@contextmanager
def no_collector() -> Iterator[None]:
    """Disable Python's garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def pairs(
    clock: Clock,
    ours: Run,
    other: Run,
    count: int,
    *,
    limit: Run | None = None,
    overhead: Mapping[str, float] | None = None,
    single: bool = False,
) -> Samples:
    """Return `count` pairs of samples in the order A B B A ..., beginning with a random side.

    limit: a program timed once per pair, after both. overhead: copied into the result. single: one call per sample, even if
    it is short.
    """
    runs = {"ours": ours, "other": other} | ({"limit": limit} if limit is not None else {})
    warmup = {who: [clock.sample(run) for _ in range(WARMUP)] for who, run in runs.items()}
    calls = {who: 1 if single else clock.calls(min(times)) for who, times in warmup.items()}
    found: dict[str, list[float]] = {who: [] for who in runs}
    first: list[Literal["ours", "other"]] = []
    turned = random.random() < 0.5  # noqa: S311
    with no_collector():
        for _ in range(count):
            first.append("other" if turned else "ours")
            order = ["other", "ours"] if turned else ["ours", "other"]
            for who in [*order, *(["limit"] if limit is not None else [])]:
                found[who].append(clock.sample(runs[who], calls[who]))
            turned = not turned
    return Samples(
        ours=found["ours"], other=found["other"], limit=found.get("limit", []), first=first, warmup=warmup, calls=calls,
        overhead=dict(overhead or {}),
    )  # fmt: skip
