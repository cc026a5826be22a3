"""Self-test of `check --loop`: does a check catch each planted fault, and do all checks pass on correct loops?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from harness.cell.loop_checks import checks
from harness.cell.loop_checks.faults import FAULTS, FaultyLoop
from harness.cell.loop_checks.observed_training import Trainee
from harness.cell.training import loop
from harness.cell.training.loop import StepSamples
from harness.conformance.findings.outcomes import CheckStatus
from harness.console import print_json, print_lines
from harness.errors import Exit
from harness.methods.registry import Registry, discover

_RIGHT: dict[str, Callable[..., StepSamples]] = {"the harness's own loop": loop.train, "a plain loop": FaultyLoop()}
"""Name of a loop without a fault -> the loop."""


@dataclass(frozen=True)
class LoopSelfTest:
    """Results of the self-test."""

    caught: dict[str, bool]
    """Name of a faulty loop -> whether the check in the loop's `caught_by` failed, as it must."""
    false_alarms: Sequence[str]
    """Checks that failed on a loop without a fault, as `loop/check`."""

    @property
    def exit(self) -> Exit:
        """FAIL if a fault was missed, or if a check failed on a loop without a fault."""
        return Exit.PASS if all(self.caught.values()) and not self.false_alarms else Exit.FAIL

    def lines(self) -> Iterator[str]:
        """Yield one line per fault, then one per failed check of a correct loop, then the number of faults caught."""
        by = {fault.__name__: fault.caught_by for fault in FAULTS}
        width = max(map(len, self.caught), default=0)
        for name, caught in self.caught.items():
            yield f"{name:<{width}}  {'caught by' if caught else 'NOT caught by'} {by[name]}"
        yield from (f"FAIL a right loop is accused: {accusation}" for accusation in self.false_alarms)
        yield f"{sum(self.caught.values())} of {len(self.caught)} faults caught"


def run(faults: Sequence[type[FaultyLoop]] = FAULTS) -> LoopSelfTest:
    """Run on each faulty loop the check that must catch it, and run all checks on loops without a fault."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are tiny, and threads would wait for each other
    try:
        registry = discover(only=["reference"])
        references = {method: checks.ReferenceTrainings(_trainee(method, registry)) for method in ("lora", "adalora")}

        def failed(train: Callable[..., StepSamples], method: str, names: Sequence[str]) -> list[str]:
            trainings = checks.ComparedTrainings(_trainee(method, registry), train, references[method])
            found = {name: checks.outcome_of("a loop", name, trainings) for name in names}
            return [name for name, one in found.items() if one.status is CheckStatus.FAIL]

        caught = {fault.__name__: bool(failed(fault(), fault.method, [fault.caught_by])) for fault in faults}
        names = [*checks.CHECKS]
        false_alarms = [
            f"{name}/{check}" for name, train in _RIGHT.items() for check in failed(train, "adalora", names)
        ]
        return LoopSelfTest(caught, false_alarms)
    finally:
        torch.set_num_threads(threads)


def check(as_json: bool) -> Exit:
    """Run the self-test, print its report as text or JSON, and return the exit code."""
    report = run()
    if as_json:
        caught = sum(report.caught.values())
        document = {"schema": 1, "faults": report.caught, "caught": caught, "planted": len(report.caught)}
        print_json({**document, "wrong": [*report.false_alarms]})
    else:
        print_lines(report.lines())
    return report.exit


def _trainee(method: str, registry: Registry) -> Trainee:
    return Trainee(method, "reference", "float32", registry)
