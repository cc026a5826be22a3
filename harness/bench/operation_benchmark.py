"""Benchmark an Operation: check two implementations on the same call, then time them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from harness.bench import ceilings, timing
from harness.bench import operations as timed_operations
from harness.bench.costs import Cost
from harness.bench.results import TIMED_CALL, BenchRow
from harness.bench.sizes import TINY, BenchSize
from harness.bench.timed_call import TimedCall
from harness.bench.verdict import judge_parity
from harness.conformance import operations, parity_suite
from harness.conformance.case import Case
from harness.conformance.execution import suite_run
from harness.conformance.findings.outcomes import CheckOutcome, DeviceLostError, Execution
from harness.conformance.operation import OperationSubject, moved
from harness.conformance.subject import DTYPES
from harness.errors import Unsupported, plural
from harness.methods.registry import Implementation
from harness.process.out_of_memory import shortage
from harness.records.check import CheckId, CheckResult, Outcome

CHECKS = ("outputs", "output_codes")
"""Names of the checks that a timed call must pass. Only checks in the Operation's parity suite are run."""
GRADIENT = "backward"
"""Name of the additional check for a timed backward pass."""
OVERHEAD_CALLS = 5
"""Number of calls on tiny tensors, which do hardly any work. Their median time is the overhead of a call."""


@dataclass
class OperationBenchmark:
    """Benchmark of one Operation: two implementations in one dtype on one device."""

    operation: str
    ours: Implementation
    other: Implementation
    dtype: str
    device: torch.device
    pairs: int
    """Number of pairs of samples per benchmark. A pair is one sample of each implementation."""
    facts: dict[str, Any]
    """Facts about the machine, copied into every row."""
    announce: timing.Announce = lambda _: None

    def __post_init__(self) -> None:
        self.plan = parity_suite.load_operation(self.operation)
        self.timed = timed_operations.every()[self.operation]
        self.definition = operations.every()[self.operation]
        self._drawn: dict[tuple[BenchSize, int], dict[str, Any]] = {}
        self.clock = timing.Clock(self.device)
        self.limits = ceilings.measure(self.clock, DTYPES[self.dtype])

    def rows(self, size: BenchSize) -> Iterator[BenchRow]:
        """Yield the result rows of one size. The first row is for the forward pass alone.

        If its backward pass is timed, a second row is for the forward and the backward pass together. Raises
        DeviceLostError if the GPU accepts no more work of this process. If a check of one implementation caused the
        loss, a row with this check is yielded first, so that the other implementation is not blamed.
        """
        arguments, parity = self._arguments(size), list[CheckOutcome]()
        try:
            for it in (self.ours, self.other):
                suite_run.require_device(self.device)
                for one in self._parity(it, self._judged(size)):
                    parity.append(one)
                    suite_run.require_device_after(one, self.device)
        except DeviceLostError:
            if parity and parity[-1].execution is Execution.RAISED:
                yield self._row(self.operation, size, arguments, parity, [self.timed.forward])  # refused
            raise
        forward = [one for one in parity if one.check != GRADIENT]
        yield self._row(self.operation, size, arguments, forward, [self.timed.forward])
        suite_run.require_device(self.device)
        if self.timed.backward is not None:
            costs = [self.timed.forward, self.timed.backward]
            yield self._row(f"{self.operation}+backward", size, arguments, parity, costs)
            suite_run.require_device(self.device)

    def _judged(self, size: BenchSize) -> BenchSize:
        return size.judged(self.device.type, self.timed.per_token)

    def _row(
        self,
        name: str,
        size: BenchSize,
        arguments: dict[str, Any],
        parity: Sequence[CheckOutcome],
        costs: Sequence[Cost],
    ) -> BenchRow:
        """Time the call of both implementations if all checks passed, and return the result row.

        parity: outcomes of the checks. costs: the cost of the forward pass and, if it is timed, of the backward pass.
        """
        checks, outcome, because = judge_parity(parity)
        samples = None
        if outcome == "measured":
            calls = [self._call(it, arguments, len(costs) > 1) for it in (self.ours, self.other)]
            overhead = self._overhead(len(costs) > 1)
            samples = timing.pairs(
                self.clock, calls[0], calls[1], self.pairs, overhead=overhead, announce=self.announce
            )
            checks, outcome, because = judge_parity([*parity, *self._after(size, calls)])
            samples = samples if outcome == "measured" else None
        judged, itemsize = self._judged(size), DTYPES[self.dtype].itemsize
        return BenchRow(
            name=name, shape=in_words(size, self.timed.per_token), dtype=self.dtype, device=self.device.type,
            ours=self.ours.name, other=self.other.name, outcome=outcome, because=because,
            judged="" if judged == size else in_words(judged, self.timed.per_token), parity=checks, samples=samples,
            ceilings=self.limits if samples is not None else None,
            bytes=sum(cost.bytes(size, itemsize) for cost in costs), flops=sum(cost.flops(size) for cost in costs),
            facts=self.facts,
        )  # fmt: skip

    def _arguments(self, size: BenchSize, seed: int = suite_run.SEED) -> dict[str, Any]:
        """Return the arguments of a call on the device, drawn in the same way as in the checks.

        The arguments of the last size are kept and returned again, because drawing large tensors takes longer than all
        calls with them. Each call gets a copy.
        """
        if (size, seed) not in self._drawn:
            if size != TINY:
                self._drawn = {
                    key: one for key, one in self._drawn.items() if key[0] == size
                }  # free the former ones first
            generator = torch.Generator().manual_seed(seed)
            drawn = self.definition.arguments(DTYPES[self.dtype], generator, **self.timed.case(size))
            self._drawn[size, seed] = moved(drawn, self.device)
        return self._drawn[size, seed]

    def _parity(self, implementation: Implementation, size: BenchSize) -> Iterator[CheckOutcome]:
        """Run the checks in CHECKS, and GRADIENT if it is timed, on a call of this size, and yield their outcomes."""
        arguments, again = self._arguments(size), partial(self._arguments, size, suite_run.SEED + 1)
        subject = OperationSubject(self.definition, implementation, self.dtype, arguments, again)
        case = Case("call", seed=suite_run.SEED, factors=self.plan.factors())
        runner = suite_run.CaseRunner(implementation, parity_suite.in_words(self.timed.case(size)), self.dtype)
        for name in CHECKS if self.timed.backward is None else (*CHECKS, GRADIENT):
            if name in self.plan.checks:
                yield runner.check(name, subject, case)

    def _overhead(self, backward: bool) -> dict[str, float]:
        """Return the seconds of a call on tiny tensors: `ours` and `other` -> median.

        An implementation that does not support such small tensors is left out. backward: True to time gradients, too.
        """
        arguments, found = self._arguments(TINY), {}
        for side, implementation in (("ours", self.ours), ("other", self.other)):
            run = self._call(implementation, arguments, backward)
            try:
                run()
            except Unsupported:
                continue
            found[side] = median(self.clock.sample(run) for _ in range(OVERHEAD_CALLS))
        return found

    def _call(self, implementation: Implementation, arguments: dict[str, Any], backward: bool) -> TimedCall:
        return TimedCall(self.definition, implementation.function, arguments, backward=backward)

    def _after(self, size: BenchSize, calls: Sequence[TimedCall]) -> Iterator[CheckOutcome]:
        """After timing, run `TimedCall.check` on each call, and yield the outcomes. Stop if the GPU is lost.

        If memory runs out, the check counts as skipped, not as failed, because memory sufficed for the timed call
        itself.
        """
        words = parity_suite.in_words(self.timed.case(size))
        case = Case("call", seed=suite_run.SEED, factors=self.plan.factors())
        check = CheckId(self.operation, TIMED_CALL, self.dtype, case.state)

        def checked(call: TimedCall) -> CheckResult:
            try:
                fresh = self._arguments(size, suite_run.SEED + 2)
                return call.check(self.dtype, fresh, case, by_reference=size == self._judged(size))
            except (MemoryError, RuntimeError) as error:
                if shortage(error) is None:
                    raise
                return CheckResult(check=str(check), outcome=Outcome.SKIPPED, detail=f"out of memory: {error}")

        for it, call in zip((self.ours, self.other), calls, strict=True):
            found = suite_run.CaseRunner(it, words, self.dtype).attempt(check, partial(checked, call))
            if isinstance(found, CheckResult):
                found = CheckOutcome(
                    implementation=it.name, kind=it.kind, target=it.target, dtype=self.dtype, case=words, result=found
                )
            yield found
            try:
                suite_run.require_device_after(found, self.device)
            except DeviceLostError:  # `rows` asks again
                return


def in_words(size: BenchSize, per_token: bool) -> str:
    """Return a size in words: layer, output x input features, and tokens, e.g. `k_proj 1024x4096, 64 tokens`."""
    tokens = f", {plural(size.tokens, 'token')}" if per_token else ""
    return f"{size.layer} {size.E}x{size.D}{tokens}"
