"""Self-test: check, in this process, that the expected checks catch the planted faults.

Each fault is planted in a copy of the reference, and the checks that should catch it try this copy in one case. If one
of them misses the fault, all checks of the suite try the copy in order, because some faults show only after other
calls. The checks also try the correct reference in the same case, and must not fail there.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import Any

import torch

from harness.conformance import checks, faults, parity_suite
from harness.conformance.checks import Reference
from harness.conformance.execution import suite_run
from harness.conformance.faults import Fault
from harness.conformance.faults.packed import pack
from harness.conformance.faults.patched_copy import PatchedCopy
from harness.conformance.findings.outcomes import CheckOutcome, Execution
from harness.console import print_json, print_lines
from harness.errors import Exit, UsageError, did_you_mean
from harness.methods.registry import DTYPES, Implementation, TargetKind, optional_features
from harness.records.record import Outcome


@dataclass(frozen=True)
class FaultVerdict:
    """One fault, and the checks that caught it."""

    fault: Fault
    caught: tuple[str, ...]
    """Names of the expected checks that failed, without those that only raised an exception."""

    @property
    def missed(self) -> tuple[str, ...]:
        """Names of the checks that should have failed and did not."""
        return tuple(name for name in self.fault.expected if name not in self.caught)

    def document(self) -> dict[str, object]:
        """Return the entry of this fault in the document that `--json` prints."""
        return {
            "fault": self.fault.name, "of": self.fault.target, "case": str(self.fault.case),
            "expected": list(self.fault.expected), "caught": list(self.caught), "missed": list(self.missed),
        }  # fmt: skip


@dataclass(frozen=True)
class SelfTestReport:
    """Results of the self-test: the verdict on each fault, and checks that fail wrongly or catch nothing."""

    verdicts: Sequence[FaultVerdict]
    wrong: Sequence[str] = field(default=())
    """Failures of the correct reference, as `target/check (case)`."""
    idle: Sequence[str] = field(default=())
    """Names of the checks that catch no fault, without those that are tried only for adapters without a reference."""

    @property
    def caught(self) -> int:
        """Number of faults that every expected check caught."""
        return sum(not verdict.missed for verdict in self.verdicts)

    @property
    def exit(self) -> Exit:
        """The exit code. The first of these rules that applies decides.

        1: an expected check missed a fault, the correct reference failed, or a check caught no fault. 5: there are no
        faults. 0: otherwise.
        """
        if self.caught < len(self.verdicts) or self.wrong or self.idle:
            return Exit.FAIL
        return Exit.PASS if self.verdicts else Exit.NOTHING_COMPARED

    def lines(self) -> Iterator[str]:
        """Yield the printed report: one line per fault, then the failures, then the number of faults caught."""
        width = max((len(f"{v.fault.target} {v.fault.name}") for v in self.verdicts), default=0)
        for verdict in self.verdicts:
            caught = f"caught by {', '.join(verdict.caught) or 'none expected'}"
            missed = f"; NOT BY {', '.join(verdict.missed)}" if verdict.missed else ""
            yield f"{f'{verdict.fault.target} {verdict.fault.name}':<{width}}  {caught}{missed}"
        yield from (f"FAIL the correct reference fails {accusation}" for accusation in self.wrong)
        yield from (f"FAIL the check {name} catches no fault" for name in self.idle)
        yield f"{self.caught} of {len(self.verdicts)} faults caught"


def run(planted: Iterable[Fault] | None = None) -> SelfTestReport:
    """Try all faults, or only `planted`, and return the report.

    If `planted` is given, the report does not list the checks that caught no fault.
    """
    every = list(faults.every() if planted is None else planted)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny, and threads would wait for each other
    try:
        return _run(every, complete=planted is None)
    finally:
        torch.set_num_threads(threads)


def _run(every: Sequence[Fault], complete: bool) -> SelfTestReport:
    verdicts = [FaultVerdict(fault, _caught(fault)) for fault in every]
    cases = {(fault.target, str(fault.case), _needs_wide(fault)): fault for fault in every}
    accusations = (
        f"{fault.target}/{failure.check} ({fault.case})"
        for fault in cases.values()
        for failure in _failures(implementation(fault.target, PatchedCopy(source_module(fault.target))), fault)
    )
    wrong = [*dict.fromkeys(accusations)]
    useful = {name for verdict in verdicts for name in verdict.caught}
    idle = (
        []
        if not complete
        else [
            name for name, one in checks.every().items() if name not in useful and one.reference is not Reference.ABSENT
        ]
    )
    return SelfTestReport(verdicts, wrong, idle)


def check(as_json: bool) -> Exit:
    """Run the self-test, print its report as text or JSON, and return the exit code."""
    report = run()
    if as_json:
        document = {
            "schema": 1, "faults": [v.document() for v in report.verdicts], "caught": report.caught,
            "planted": len(report.verdicts), "wrong": list(report.wrong), "idle": list(report.idle),
        }  # fmt: skip
        print_json(document)
    else:
        print_lines(report.lines())
    return report.exit


def _caught(fault: Fault) -> tuple[str, ...]:
    """Return the names of the expected checks that catch a fault, each once, in the suite's order.

    A check that ends with an exception does not count: a fault with a typing error would raise an exception in every
    check.
    """
    caught: dict[str, None] = {}
    for names in (fault.expected, None):
        failures = _failures(_spoilt(fault), fault, names)
        caught = dict.fromkeys(f.check for f in failures if f.execution is not Execution.RAISED)
        if caught.keys() >= set(fault.expected):
            break
    return tuple(name for name in caught if name in fault.expected)


def _failures(
    implementation: Implementation, fault: Fault, names: Collection[str] | None = None
) -> Iterator[CheckOutcome]:
    """Try an implementation in the fault's case, and yield the outcome of every check that fails.

    names: the checks that are tried; None for all of the suite or, for a loader, the expected ones.
    """
    case, plan = fault.case.of_kind(implementation.kind), _plan(implementation.target)
    if any(checks.every()[name].calls_first for name in fault.expected):
        case = replace(case, first=case)
    if names is None and isinstance(plan, parity_suite.LoaderSuite) and fault.expected:
        names = fault.expected  # all checks of a loader would take too long: each builds models of its own
    if names is not None:
        plan = plan.model_copy(update={"checks": [name for name in plan.checks if name in names]})
    outcomes = suite_run.run_case(implementation, plan, case, wide=_needs_wide(fault))
    return (one for one in outcomes if one.result.outcome is Outcome.FAIL)


def _needs_wide(fault: Fault) -> bool:
    """Return whether one of the fault's expected checks takes so long that only `check --wide` tries it."""
    return any(checks.every()[name].only_wide for name in fault.expected)


def _spoilt(fault: Fault) -> Implementation:
    copy = PatchedCopy(source_module(fault.target))
    fault.spoil(copy)
    return implementation(fault.target, copy)


@cache
def _plan(target: str) -> parity_suite.ParitySuite:
    return parity_suite.load_plan(target)


def require_targets(names: Iterable[str], option: str) -> None:
    """Raise UsageError for a name that has no parity suite. option: the command-line option to name in the error
    message.
    """
    for name in names:
        if name not in parity_suite.names():
            hint = did_you_mean(name, parity_suite.names(), "targets")
            raise UsageError(f"no method or operation is called {name!r}", where=option, hint=hint)


@cache
def _kind(target: str) -> TargetKind:
    return parity_suite.kind_of(target)


def source_module(target: str) -> str:
    """Return the dotted name of the module with the reference of a target, such as a Method."""
    fixed: dict[TargetKind, str] = {
        "base": "reference.operations.nf4",
        "loader": "harness.methods.reference_loader",
        "operation": f"harness.conformance.operations.{target}",
    }
    return fixed.get(_kind(target), f"reference.{target}")


def implementation(target: str, copy: PatchedCopy) -> Implementation:
    """Return an Implementation of the target that runs the code in `copy`, a changed copy of the target's module."""
    kind = _kind(target)
    function: Any = {"method": copy.attach, "base": partial(pack, copy, target == "nf4-dq")}.get(kind)
    if kind == "operation":
        function = copy.module().OPERATION.reference
    elif kind == "loader":
        function = copy.module().ReferenceLoader
    offers = optional_features(target) if kind == "method" else ()
    if kind == "base":  # `own_adapters` finds the reference's adapters by this name
        return Implementation("reference", kind, target, function, dtypes=DTYPES, point="reference")
    return Implementation("planted", kind, target, function, dtypes=DTYPES, offers=offers)
