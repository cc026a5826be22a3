"""Results of a benchmark: raw samples, and numbers that are computed from them, such as medians and ratios.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Literal

from pydantic import Field

from harness.analysis.statistics.intervals import Median, median_interval
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.records.record import FrozenModel, Json, Seconds

Outcome = Literal["measured", "refused", "not-run", "failed"]
Cause = Literal["no-gpu", "interrupted"]
TIMED_CALL = "timed_call"
"""Name of the check that repeats the timed call with other values, after timing."""
MOSTLY_CALL = 0.2
"""Largest share of a call's time that may be overhead. Beyond it, overheads distort a ratio of times."""
MOSTLY_LAUNCH = 0.8
"""Smallest share of a call's time on a GPU at which launching by the host limits the speed."""
TIMER_SHARE, TIMER_SLACK_S = 1.25, 0.25
"""Limit of the time that may pass in another process while samples are taken on a CPU.

The limit is TIMER_SHARE times the total time of the timed calls, plus TIMER_SLACK_S seconds for messages that are late
on a busy machine. If more time passes, the timer of the measured process is wrong.
"""


class Samples(FrozenModel):
    """Times of two programs, `ours` and `other`, that run alternately. The n-th times of both programs are one pair."""

    ours: list[Seconds] = Field(min_length=1)
    other: list[Seconds] = Field(min_length=1)
    limit: list[Seconds] = Field(default=[])
    """Times of a third program, which are a lower bound for those of the two programs. Empty if there is none."""
    first: list[Literal["ours", "other"]]
    """For each pair, the program that ran first."""
    warmup: dict[str, list[Seconds]] = Field(default={})
    """`ours` or `other` -> times of the warm-up before the samples."""
    calls: dict[str, int] = Field(default={})
    """`ours` or `other` -> number of calls per sample. A sample is the mean time of these calls."""
    overhead: dict[str, Seconds] = Field(default={})
    """`ours` or `other` -> time of a call on tiny tensors, which does hardly any work."""
    launch: dict[str, Seconds] = Field(default={})
    """`ours` or `other` -> median time in which the host launches a call on a GPU. Empty on a CPU."""
    parts: dict[str, list[list[Seconds]]] = Field(default={})
    """`ours` or `other` -> one list per sample, with the times from which the sample was computed.

    Empty if the samples were timed directly.
    """

    @property
    def total_s(self) -> float:
        """Seconds of all calls in all samples together."""
        times = {"ours": self.ours, "other": self.other, "limit": self.limit}
        return sum(self.calls.get(name, 1) * sum(samples) for name, samples in times.items())

    def disagrees(self, elapsed_s: float) -> bool:
        """Return whether `elapsed_s` exceeds TIMER_SHARE times the sum of the samples, plus TIMER_SLACK_S.

        elapsed_s: seconds that the sampling took, by the clock of another process, without the changes of the inputs.
        Samples with `parts` never disagree.
        """
        if self.parts:
            return False  # gradients are drawn between these samples
        return elapsed_s > TIMER_SHARE * self.total_s + TIMER_SLACK_S


class Ceilings(FrozenModel):
    """Highest rates of the machine, measured in the process of the benchmark."""

    copy_B_per_s: float
    """Bytes per second that a copy reads and writes."""
    gemm_FLOP_per_s: float
    """FLOP/s of a matrix product in the dtype of the row."""


class Products(FrozenModel):
    """FLOPs of matrix products, as torch counts them, in a training step of `ours`, of `other`, and in the frozen pass.

    The frozen pass runs the model forward and backward, but trains nothing.
    """

    ours: int
    other: int
    frozen: int


class BenchRow(FrozenModel):
    """The result of one benchmark of two implementations, `ours` and `other`."""

    name: str
    shape: str
    dtype: str
    device: str
    ours: str
    other: str
    outcome: Outcome
    because: str = ""
    """Reason for an `outcome` other than `measured`. Otherwise empty."""
    cause: Cause | None = None
    """`no-gpu` or `interrupted` if the row was not measured for this reason, otherwise None."""
    differs: str = ""
    """Text that says how the computations of the two implementations differ. Empty if they do not."""
    judged: str = ""
    """The size on which the checks compared the implementations with the reference. Empty if it is the timed size."""
    parity: list[CheckOutcome] = Field(default=[])
    """Outcomes of all checks that had to pass before the times count."""
    samples: Samples | None = None
    ceilings: Ceilings | None = None
    bytes: float | None = None
    """Least number of bytes that the call must move, computed by formula."""
    flops: float | None = None
    """Least number of floating-point operations of the call, computed by formula."""
    limit: str = "frozen pass"
    """Name of the program whose times are in `samples.limit`."""
    products: Products | None = None
    """FLOPs of the matrix products of a training step.

    None for an Operation and for GaLore, and on a GPU or a quantised base, where torch does not count all products.
    """
    memory: dict[str, dict[str, int]] = Field(default={})
    """Implementation -> memory of its process, in bytes. `peak_B` is the peak during a few steps, `rest_B` is the
    memory before these steps, and `bare_B` is the memory without a model."""
    losses: dict[str, list[float]] = Field(default={})
    """Implementation -> loss of each step."""
    facts: dict[str, Json] = Field(default={})
    """Facts about the benchmark: number of threads, load of the machine before it, GPU, and the implementations that
    packed the base."""

    @property
    def has_unexplained_failure(self) -> bool:
        """True if a check failed, unless a known defect explains the failure."""
        return any(one.status is CheckStatus.FAIL for one in self.parity)

    @property
    def ratio(self) -> Median | None:
        """Time of `other` divided by the time of `ours`: the median over all pairs, with its interval.

        If it is above 1, `ours` is faster. None if there are no samples.
        """
        if self.samples is None:
            return None
        return median_interval([b / a for a, b in zip(self.samples.ours, self.samples.other, strict=True)])

    @property
    def limit_ratio(self) -> float | None:
        """Time of `ours` / the lower bound `samples.limit`, the median over pairs. None without a lower bound."""
        if self.samples is None or not self.samples.limit:
            return None
        return median(a / least for a, least in zip(self.samples.ours, self.samples.limit, strict=True))

    @property
    def products_ratio(self) -> float | None:
        """`products.ours` / `products.frozen`. None if the FLOPs were not counted.

        `limit_ratio` would have the same value if matrix products took all the time.
        """
        return None if self.products is None else self.products.ours / self.products.frozen

    @property
    def least_s(self) -> float | None:
        """Least possible time in seconds, by the roofline model. None if it is unknown.

        It is the longer of two times: to move the bytes, and to compute the FLOPs.
        """
        if self.ceilings is None or self.bytes is None or self.flops is None:
            return None
        return max(self.bytes / self.ceilings.copy_B_per_s, self.flops / self.ceilings.gemm_FLOP_per_s)

    def share(self, seconds: Sequence[float]) -> float | None:
        """Return the least possible time (`least_s`) divided by the median of `seconds`. None if the former is unknown.

        The share exceeds 1 if a cache holds all data.
        """
        return None if self.least_s is None else self.least_s / median(seconds)

    @property
    def mostly_call(self) -> list[str]:
        """The programs (`ours`, `other`) whose call overhead exceeds the share `MOSTLY_CALL` of their median time."""
        if self.samples is None:
            return []
        times = {"ours": self.samples.ours, "other": self.samples.other}
        overhead = self.samples.overhead
        return [side for side, s in times.items() if overhead.get(side, 0.0) > MOSTLY_CALL * median(s)]

    @property
    def host_bound(self) -> list[str]:
        """The programs (`ours`, `other`) whose launch takes at least the share `MOSTLY_LAUNCH` of their median time."""
        if self.samples is None:
            return []
        times, launch = {"ours": self.samples.ours, "other": self.samples.other}, self.samples.launch
        return [side for side, s in times.items() if launch.get(side, 0.0) >= MOSTLY_LAUNCH * median(s)]

    @property
    def memory_ratio(self) -> float | None:
        """Memory of training steps of `other` / memory of training steps of `ours`. None if unknown."""
        ours, other = self.step_memory(self.ours), self.step_memory(self.other)
        return None if not ours or not other else other / ours

    def step_memory(self, implementation: str) -> int | None:
        """Return the memory that training steps need, in bytes. None if it is unknown.

        It is the peak of the process minus its memory without a model.
        """
        found = self.memory.get(implementation)
        return None if found is None else found["peak_B"] - found["bare_B"]

    def document(self) -> dict[str, Any]:
        """Return a dict for JSON: all fields, and the numbers that are computed from the samples."""
        made: dict[str, Any] = {}
        if self.samples is not None:
            ratio = self.ratio
            made = {
                "ours_s": median(self.samples.ours), "other_s": median(self.samples.other),
                "ratio": None if ratio is None else {"value": ratio.value, "low": ratio.low, "high": ratio.high},
                "share_ours": self.share(self.samples.ours), "share_other": self.share(self.samples.other),
                "limit_ratio": self.limit_ratio, "products_ratio": self.products_ratio, "memory_ratio": self.memory_ratio,
                "mostly_call": self.mostly_call, "host_bound": self.host_bound,
            }  # fmt: skip
        return {**self.model_dump(mode="json"), "made": made}
