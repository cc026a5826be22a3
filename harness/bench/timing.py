"""Time two programs, A and B, in alternating order: A B, B A, A B ...

A slow phase of the machine then affects both programs equally.
"""

from __future__ import annotations

import gc
import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from statistics import median
from time import perf_counter  # bound here, so that a plug-in that replaces `time.perf_counter` changes no sample
from typing import Any, Literal

import torch

from harness.bench.results import Samples

Run = Callable[[], object]
Side = Literal["ours", "other"]
Announce = Callable[[Literal["begin", "end", "changed"]], object]
"""Function that is called with `begin` before the first sample and with `end` after the last sample.

After `end`, the inputs change as many times again without calls, so that another process can subtract this time; then
`changed`.
"""
SIDES: tuple[Side, Side] = ("ours", "other")


class FreshProgram(ABC):
    """A program whose inputs change before each call, so that no result of an earlier call is right again.

    The clock stops while the inputs change and while a result is kept.
    """

    @abstractmethod
    def expect(self, calls: int) -> None:
        """Choose which of the next `calls` results to keep."""

    @abstractmethod
    def prepare(self) -> None:
        """Change the inputs of the next call."""

    @abstractmethod
    def __call__(self) -> object:
        """Run the program. Return its result."""

    @abstractmethod
    def receive(self, returned: Any) -> None:
        """Take the result of the last call, and keep a copy of it or nothing."""


WARMUP = 3
"""Number of calls of each program before its first sample."""
LEAST_S = 0.025
"""Shortest duration of a sample on a CPU, in seconds.

A shorter call is repeated, and the sample is the mean time of the calls. The samples of 12 pairs then last 0.6 s, which
another process can measure (see `results.TIMER_SLACK_S`).
"""
MOST_CALLS = 1000
"""Largest number of calls in a sample."""
FLUSH_B = 256 * 2**20
"""Smallest number of bytes to write to flush the L2 cache. Twice the size of the cache is written if this is more."""
WARM_S = 0.1
"""Seconds of load on a GPU before pairs of samples. Meanwhile the GPU raises its clock frequencies."""
HEAD_START = 2_000_000
"""Number of clock cycles that the GPU waits before a timed call: about a millisecond.

The host queues the call during this wait. Queueing takes up to half of the wait. Without the wait, the measured time of
a small call would be the time that the host takes to queue the call.
"""


class Clock:
    """A timer of calls. On a CPU, it reads the wall clock.

    On a GPU, CUDA events measure each call, and the L2 cache is overwritten before each call.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.launch_s: list[float] = []
        """For each call on a GPU, the seconds in which the host launched it."""
        self._flush = torch.empty(_flush_bytes(device) // 4, dtype=torch.int32, device=device) if self.on_gpu else None

    def warm_up(self, run: Run, seconds: float) -> None:
        """On a GPU, call `run` for `seconds` without pause, because the clock frequencies of an idle GPU are low."""
        started = perf_counter()
        while self.on_gpu and perf_counter() - started < seconds:
            run()
            torch.cuda.synchronize(self.device)

    def sample(self, run: Run, calls: int = 1) -> float:
        """Call `run` `calls` times. Return the mean seconds of a call."""
        if self._flush is not None:
            return sum(self._event(run, self._flush) for _ in range(calls)) / calls
        if isinstance(run, FreshProgram):
            return sum(_span(run) for _ in range(calls)) / calls
        started = perf_counter()
        for _ in range(calls):
            run()
        return (perf_counter() - started) / calls

    def calls(self, seconds: float) -> int:
        """Return the number of calls for one sample, if one call takes `seconds`."""
        return 1 if self.on_gpu else max(1, min(MOST_CALLS, math.ceil(LEAST_S / max(seconds, 1e-9))))

    def _event(self, run: Run, flush: torch.Tensor) -> float:
        begin: Any = torch.cuda.Event(enable_timing=True)
        end: Any = torch.cuda.Event(enable_timing=True)
        if isinstance(run, FreshProgram):
            run.prepare()
        flush.zero_()
        torch.cuda._sleep(HEAD_START)  # type: ignore[no-untyped-call]
        begin.record()
        started = perf_counter()
        returned = run()
        self.launch_s.append(perf_counter() - started)
        end.record()
        if isinstance(run, FreshProgram):
            run.receive(returned)
        torch.cuda.synchronize(self.device)
        return float(begin.elapsed_time(end)) / 1e3


def _span(run: FreshProgram) -> float:
    """Return the seconds of a call on the CPU, which include the release of its result."""
    run.prepare()
    started = perf_counter()
    returned = run()
    seconds = perf_counter() - started
    run.receive(returned)
    started = perf_counter()
    del returned
    return seconds + perf_counter() - started


def alternate(count: int) -> Iterator[tuple[Side, Side]]:
    """Yield the order of `ours` and `other` for each of `count` pairs. Each pair reverses the previous order.

    The order of the first pair is random. Python's garbage collector is off until the last pair is done.
    """
    order = SIDES if random.random() < 0.5 else SIDES[::-1]  # noqa: S311
    gc.collect()
    gc.disable()
    try:
        for _ in range(count):
            yield order
            order = order[::-1]
    finally:
        gc.enable()


def pairs(
    clock: Clock, ours: Run, other: Run, count: int, *, limit: Run | None = None,
    overhead: Mapping[str, float] | None = None, single: bool = False, announce: Announce = lambda _: None,
) -> Samples:  # fmt: skip
    """Time two programs in `count` pairs of alternating order. Return the samples in seconds per call.

    limit: a third program, timed once after each pair. overhead: copied into the result. single: True for samples of
    one call each, even if it is short. announce: see `Announce`. Another process can thus measure the calls.
    """
    runs = {"ours": ours, "other": other} | ({"limit": limit} if limit is not None else {})
    clock.warm_up(other, WARM_S)
    warmup = {name: [clock.sample(run) for _ in range(WARMUP)] for name, run in runs.items()}
    calls = {name: 1 if single else clock.calls(median(times)) for name, times in warmup.items()}
    for name, run in runs.items():
        if isinstance(run, FreshProgram):
            run.expect(count * calls[name])
    found: dict[str, list[float]] = {name: [] for name in runs}
    launches: dict[str, list[float]] = {name: [] for name in runs}
    first: list[Side] = []
    for order in alternate(count):
        if not first:
            announce("begin")
        first.append(order[0])
        for name in (*order, *(["limit"] if limit is not None else [])):
            clock.launch_s.clear()
            found[name].append(clock.sample(runs[name], calls[name]))
            launches[name] += clock.launch_s
    announce("end")
    for name, run in runs.items():
        if isinstance(run, FreshProgram):
            for _ in range(count * calls[name]):
                run.prepare()
    announce("changed")
    return Samples(
        ours=found["ours"], other=found["other"], limit=found.get("limit", []), first=first, warmup=warmup, calls=calls,
        overhead=dict(overhead or {}), launch={name: median(times) for name, times in launches.items() if times},
    )  # fmt: skip


def _flush_bytes(device: torch.device) -> int:
    """Return the number of bytes to write so that no data of an earlier call is left in the GPU's L2 cache."""
    return max(FLUSH_B, 2 * int(torch.cuda.get_device_properties(device).L2_cache_size))
