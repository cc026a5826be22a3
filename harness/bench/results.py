"""Results of a benchmark: raw samples, and medians, ratios and shares of a limit computed from them. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count
from statistics import median
from typing import Any, Literal

from pydantic import Field

from harness.analysis.statistics.intervals import Median, median_interval
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.records.record import FrozenModel, Json, Seconds

Outcome = Literal["measured", "refused", "not-run", "failed"]
Cause = Literal["no-gpu", "interrupted"]
MOSTLY_CALL = 0.2
"""Largest share of call overhead in a time. Above this share, a ratio of times compares overheads rather than work."""
FEWEST = next(n for n in count(1) if median_interval([0.0] * n).low is not None)
"""Fewest pairs for which the ratio has an interval."""


class Samples(FrozenModel):
    """Times of two programs that alternate: the n-th times of both are one pair."""

    ours: list[Seconds] = Field(min_length=1)
    other: list[Seconds] = Field(min_length=1)
    limit: list[Seconds] = Field(default=[])
    """Times of a third program, if there is one. They are a lower bound for both."""
    first: list[Literal["ours", "other"]]
    """The side that began each pair."""
    warmup: dict[str, list[Seconds]] = Field(default={})
    """Side -> times before the samples."""
    calls: dict[str, int] = Field(default={})
    """Side -> calls per sample; a sample is the mean time of these calls."""
    overhead: dict[str, Seconds] = Field(default={})
    """Side -> time of a call of tiny size."""
    parts: dict[str, list[list[Seconds]]] = Field(default={})
    """Side -> for each sample, the times from which it was computed; empty if samples were timed directly."""


class Ceilings(FrozenModel):
    """Rates of the machine, measured in the process of the benchmark."""

    copy_B_per_s: float
    """Bytes read and written per second by a copy."""
    gemm_FLOP_per_s: float
    """FLOP/s of a matrix product in the dtype of the row."""


class Products(FrozenModel):
    """FLOPs of the matrix products of a training step by each side, and of the frozen pass, as torch counts them."""

    ours: int
    other: int
    frozen: int


class BenchRow(FrozenModel):
    """One benchmark of two implementations."""

    name: str
    shape: str
    dtype: str
    device: str
    ours: str
    other: str
    outcome: Outcome
    because: str = ""
    """Reason why the row was not measured."""
    cause: Cause | None = None
    """The reason as far as exit codes and notes depend on it."""
    differs: str = ""
    """Differences between the two computations, if there are any."""
    judged: str = ""
    """The size on which parity was judged, if smaller than the timed size."""
    parity: list[CheckOutcome] = Field(default=[])
    """Results of all checks that had to pass."""
    samples: Samples | None = None
    ceilings: Ceilings | None = None
    bytes: float | None = None
    """Least bytes moved, by formula."""
    flops: float | None = None
    """Least floating-point operations, by formula."""
    limit: str = "frozen pass"
    """Name of the lower bound in `samples.limit`."""
    products: Products | None = None
    """FLOPs of a training step; None on a GPU and with a quantised base: torch does not count all of them."""
    memory: dict[str, dict[str, int]] = Field(default={})
    """Implementation -> memory of its process: `peak_B` during steps, `rest_B` before, `bare_B` without a model."""
    losses: dict[str, list[float]] = Field(default={})
    """Implementation -> loss of each step."""
    facts: dict[str, Json] = Field(default={})
    """Threads, load of the machine before the benchmark, GPU, packers of the base."""

    @property
    def red(self) -> bool:
        """True if a check failed without a known defect."""
        return any(one.status is CheckStatus.FAIL for one in self.parity)

    @property
    def ratio(self) -> Median | None:
        """Median of the other's time / our time over all pairs, with its interval. Above 1, ours is faster."""
        if self.samples is None:
            return None
        return median_interval([b / a for a, b in zip(self.samples.ours, self.samples.other, strict=True)])

    @property
    def limit_ratio(self) -> float | None:
        """Median of our time / the time of the limit over all pairs; None without a limit."""
        if self.samples is None or not self.samples.limit:
            return None
        return median(a / least for a, least in zip(self.samples.ours, self.samples.limit, strict=True))

    @property
    def products_ratio(self) -> float | None:
        """Ratio of the FLOPs of our matrix products to those of the frozen pass; None if they were not counted.

        `limit_ratio` would equal it if all other work took no time.
        """
        return None if self.products is None else self.products.ours / self.products.frozen

    @property
    def least_s(self) -> float | None:
        """Least time by the roofline, in seconds: the longer of the time for the bytes and the time for the FLOPs."""
        if self.ceilings is None or self.bytes is None or self.flops is None:
            return None
        return max(self.bytes / self.ceilings.copy_B_per_s, self.flops / self.ceilings.gemm_FLOP_per_s)

    def share(self, seconds: Sequence[float]) -> float | None:
        """Return the least time / the median of these times; None if unknown. Above 1 if a cache holds all data."""
        return None if self.least_s is None else self.least_s / median(seconds)

    @property
    def mostly_call(self) -> list[str]:
        """Sides (`ours`, `other`) for which call overhead exceeds the share `MOSTLY_CALL` of the median time."""
        if self.samples is None:
            return []
        times = {"ours": self.samples.ours, "other": self.samples.other}
        overhead = self.samples.overhead
        return [side for side, s in times.items() if overhead.get(side, 0.0) > MOSTLY_CALL * median(s)]

    @property
    def memory_ratio(self) -> float | None:
        """The other's `step_memory` / our `step_memory`; None if either is unknown."""
        ours, other = self.step_memory(self.ours), self.step_memory(self.other)
        return None if not ours or not other else other / ours

    def step_memory(self, implementation: str) -> int | None:
        """Return the peak of a process minus its memory without a model, in bytes; None if unknown."""
        found = self.memory.get(implementation)
        return None if found is None else found["peak_B"] - found["bare_B"]

    def document(self) -> dict[str, Any]:
        """Return a document for JSON with all fields and with the numbers computed from the samples."""
        made: dict[str, Any] = {}
        if self.samples is not None:
            ratio = self.ratio
            made = {
                "ours_s": median(self.samples.ours), "other_s": median(self.samples.other),
                "ratio": None if ratio is None else {"value": ratio.value, "low": ratio.low, "high": ratio.high},
                "share_ours": self.share(self.samples.ours), "share_other": self.share(self.samples.other),
                "limit_ratio": self.limit_ratio, "products_ratio": self.products_ratio, "memory_ratio": self.memory_ratio,
                "mostly_call": self.mostly_call,
            }  # fmt: skip
        return {**self.model_dump(mode="json"), "made": made}
