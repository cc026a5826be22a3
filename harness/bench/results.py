"""What a benchmark leaves: raw samples, and what is made of them: medians, ratios, shares of a limit. No torch."""

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
NO_GPU, INTERRUPTED = "no GPU", "interrupted"
"""How the reason of a row that is not run may begin."""
MOSTLY_CALL = 0.2
"""Where this share of a time is what a call of almost nothing takes, the ratio says more of the call than of the work."""
FEWEST = next(n for n in count(1) if median_interval([0.0] * n).low is not None)
"""Of pairs, for the ratio to have an interval."""


class Samples(FrozenModel):
    """Times of two programs taken in turn, in seconds, in the order of the pairs; and of what limits both, if anything.

    first: which of the two began in each pair. warmup: untimed otherwise. calls: how many calls a sample is the mean of.
    overhead: what a call of tiny size takes. parts: what samples were made of, where they were.
    """

    ours: list[Seconds] = Field(min_length=1)
    other: list[Seconds] = Field(min_length=1)
    limit: list[Seconds] = Field(default=[])
    first: list[Literal["ours", "other"]]
    warmup: dict[str, list[Seconds]] = Field(default={})
    calls: dict[str, int] = Field(default={})
    overhead: dict[str, Seconds] = Field(default={})
    parts: dict[str, list[list[Seconds]]] = Field(default={})


class Ceilings(FrozenModel):
    """What the machine reached in the same process: bytes read and written per second of a copy; FLOP/s of a product."""

    copy_B_per_s: float
    gemm_FLOP_per_s: float


class Products(FrozenModel):
    """The FLOPs of the matrix products of a training step, and of the frozen pass, as torch counts them."""

    ours: int
    other: int
    frozen: int


class BenchRow(FrozenModel):
    """One benchmark: a name, a shape, a dtype, two implementations.

    because: why it is not measured. differs: how the two do not compute the same, where they do not. judged: on what its
    parity was judged, where that is less than what was timed. parity: every check that had to pass. bytes, flops: by
    formula. limit: what the samples of the limit are of. products: of a training step; where Triton ran, or a library on
    NF4, they are not counted. memory: implementation -> bytes of a process with it alone: at most during the steps (peak),
    before them (rest), before there was a model (bare). losses: implementation -> the loss of each step. facts: threads, the
    machine's load before, the GPU, who packed the base.
    """

    name: str
    shape: str
    dtype: str
    device: str
    ours: str
    other: str
    outcome: Outcome
    because: str = ""
    differs: str = ""
    judged: str = ""
    parity: list[CheckOutcome] = Field(default=[])
    samples: Samples | None = None
    ceilings: Ceilings | None = None
    bytes: float | None = None
    flops: float | None = None
    limit: str = "frozen pass"
    products: Products | None = None
    memory: dict[str, dict[str, int]] = Field(default={})
    losses: dict[str, list[float]] = Field(default={})
    facts: dict[str, Json] = Field(default={})

    @property
    def red(self) -> bool:
        """Whether a check failed that no known defect explains."""
        return any(one.standing is CheckStatus.FAIL for one in self.parity)

    @property
    def ratio(self) -> Median | None:
        """The other's time over ours, pair by pair: above 1, ours is faster."""
        if self.samples is None:
            return None
        return median_interval([b / a for a, b in zip(self.samples.ours, self.samples.other, strict=True)])

    @property
    def limit_ratio(self) -> float | None:
        """Our time over that of what limits it, pair by pair; 1 is the least."""
        if self.samples is None or not self.samples.limit:
            return None
        return median(a / least for a, least in zip(self.samples.ours, self.samples.limit, strict=True))

    @property
    def products_ratio(self) -> float | None:
        """Our products' FLOPs over those of the frozen pass: what `limit_ratio` would be if all else took no time."""
        return None if self.products is None else self.products.ours / self.products.frozen

    @property
    def least_s(self) -> float | None:
        """The time that the roofline allows: of the bytes at the rate of a copy, or of the FLOPs at that of a product."""
        if self.ceilings is None or self.bytes is None or self.flops is None:
            return None
        return max(self.bytes / self.ceilings.copy_B_per_s, self.flops / self.ceilings.gemm_FLOP_per_s)

    def share(self, seconds: Sequence[float]) -> float | None:
        """Return the share of the roofline that these times reach. Above 1 where a cache holds it all."""
        return None if self.least_s is None else self.least_s / median(seconds)

    @property
    def mostly_call(self) -> list[str]:
        """Which of `ours` and `other` spend much of their time on what any call takes, however small."""
        if self.samples is None:
            return []
        times = {"ours": self.samples.ours, "other": self.samples.other}
        overhead = self.samples.overhead
        return [who for who, s in times.items() if overhead.get(who, 0.0) > MOSTLY_CALL * median(s)]

    @property
    def memory_ratio(self) -> float | None:
        """The other's memory over ours, see `taken`."""
        ours, other = self.taken(self.ours), self.taken(self.other)
        return None if not ours or not other else other / ours

    def taken(self, who: str) -> int | None:
        """Return the peak in bytes less what the process held before there was a model: libraries are no part of a step."""
        found = self.memory.get(who)
        return None if found is None else found["peak_B"] - found["bare_B"]

    def document(self) -> dict[str, Any]:
        """Return everything as JSON can hold it, the numbers made of the samples included."""
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
