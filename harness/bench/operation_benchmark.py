"""An Operation benchmarked: both implementations judged on the very call, and only then timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from harness.bench import ceilings, timing
from harness.bench import operations as timed_operations
from harness.bench.costs import Cost
from harness.bench.results import BenchRow
from harness.bench.sizes import TINY, BenchSize
from harness.bench.verdict import standing
from harness.conformance import operations, parity_suite
from harness.conformance.case import Case
from harness.conformance.comparison import operation_call
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome
from harness.conformance.operation import OperationSubject, cloned, mapped
from harness.conformance.subject import DTYPES
from harness.errors import Unsupported
from harness.methods.registry import Implementation

CHECKS = ("outputs", "output_codes")
GRADIENT = "backward"
OVERHEAD_CALLS = 5


@dataclass
class OperationBenchmark:
    """One Operation by two implementations, in one dtype on one device.

    pairs: of samples of each benchmark. threads: of torch; None on a GPU.
    """

    operation: str
    ours: Implementation
    other: Implementation
    dtype: str
    device: torch.device
    pairs: int
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        self.plan = parity_suite.load_operation(self.operation)
        self.how = timed_operations.every()[self.operation]
        self.it = operations.every()[self.operation]
        self.clock = timing.Clock(self.device)
        self.limits = ceilings.measure(self.clock, DTYPES[self.dtype])

    def rows(self, size: BenchSize) -> Iterator[BenchRow]:
        """Yield the benchmarks of one size: of the call, and of the call with its gradients if it has any."""
        judged = size.judged(self.device.type, self.how.per_token)
        given = self._arguments(size)
        parity = [one for it in (self.ours, self.other) for one in self._parity(it, judged)]
        yield self._row(size, judged, given, [one for one in parity if one.check != GRADIENT], backward=False)
        if self.how.backward is not None:
            yield self._row(size, judged, given, parity, backward=True)

    def _row(
        self, size: BenchSize, judged: BenchSize, given: dict[str, Any], parity: Sequence[CheckOutcome], backward: bool
    ) -> BenchRow:
        tried, outcome, because = standing(parity)
        forward, more = self.how.forward, self.how.backward
        itemsize = DTYPES[self.dtype].itemsize

        def cost(of: Callable[[Cost], float]) -> float:
            return of(forward) + (of(more) if backward and more is not None else 0.0)

        samples = None
        if outcome == "measured":
            overhead = self._overhead(backward)
            ours, other = (self._call(it, given, backward) for it in (self.ours, self.other))
            samples = timing.pairs(self.clock, ours, other, self.pairs, overhead=overhead)
        return BenchRow(
            name=f"{self.operation}+backward" if backward else self.operation,
            shape=words(size, self.how.per_token), dtype=self.dtype, device=self.device.type,
            ours=self.ours.name, other=self.other.name, outcome=outcome, because=because,
            judged="" if judged == size else words(judged, self.how.per_token), parity=tried,
            samples=samples, ceilings=self.limits if samples is not None else None,
            bytes=cost(lambda c: c.bytes(size, itemsize)), flops=cost(lambda c: c.flops(size)), facts=self.facts,
        )  # fmt: skip

    def _arguments(self, size: BenchSize) -> dict[str, Any]:
        """Draw the arguments as the checks do, and put them on the device."""
        return self._drawn(size, suite_run.SEED)

    def _drawn(self, size: BenchSize, seed: int) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        drawn = self.it.arguments(DTYPES[self.dtype], generator, **self.how.case(size))
        there: dict[str, Any] = mapped(drawn, lambda one: one.to(self.device) if isinstance(one, Tensor) else one)
        return there

    def _parity(self, implementation: Implementation, size: BenchSize) -> Iterator[CheckOutcome]:
        """Yield the checks of this very call that the Operation's parity suite has."""
        subject = OperationSubject(
            self.it, implementation, self.dtype, self._arguments(size), lambda: self._drawn(size, suite_run.SEED + 1)
        )
        case = Case("call", seed=suite_run.SEED, factors=self.plan.factors())
        for name in (*CHECKS, *([GRADIENT] if self.how.backward is not None else [])):
            if name in self.plan.checks:
                result = suite_run.tried(name, subject, case, f"{self.operation}/{name}/{self.dtype}/call")
                yield CheckOutcome(
                    implementation=implementation.name, kind="operation", target=self.operation, dtype=self.dtype,
                    case=parity_suite.in_words(self.how.case(size)), result=result,
                )  # fmt: skip

    def _overhead(self, backward: bool) -> dict[str, float]:
        """Return what a call of almost nothing takes; of an implementation that does not offer it, nothing."""
        given, found = self._arguments(TINY), {}
        for who, implementation in (("ours", self.ours), ("other", self.other)):
            run = self._call(implementation, given, backward)
            try:
                run()
            except Unsupported:
                continue
            found[who] = median(self.clock.sample(run) for _ in range(OVERHEAD_CALLS))
        return found

    def _call(self, implementation: Implementation, given: dict[str, Any], backward: bool) -> Callable[[], object]:
        """Return what is timed: the call without gradients, or the call and the gradients of what it differentiates."""
        function = implementation.function
        if not backward:

            def forward() -> None:
                with torch.no_grad():
                    function(**given)

            return forward
        own = cloned(given)
        leaves = [
            t.requires_grad_(True)
            for n, t in operation_call.flat(own).items()
            if n.partition("[")[0] in self.it.differentiable
        ]
        first = self.it.outputs[0]
        y = self.it.named(function(**own))[first]
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.device, y.dtype)
        del y

        def train() -> None:
            torch.autograd.grad(self.it.named(function(**own))[first], leaves, dy, allow_unused=True)

        return train


def words(size: BenchSize, per_token: bool) -> str:
    """Name a size: `q_proj 4096x4096, 64 tokens`; a weight is (out)x(in)."""
    tokens = f", {size.tokens} token{'s' if size.tokens != 1 else ''}" if per_token else ""
    return f"{size.layer} {size.E}x{size.D}{tokens}"
