"""Measures: results of the conformance suite, which compares implementations of a Method with a float64 reference.

It uses small tensors.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator

from harness.claims.measure import MeasureResult, Method, NotRunError, measure
from harness.errors import did_you_mean


def _check(name: str) -> str:
    from harness.conformance import checks

    if name not in (there := checks.docstrings()):
        raise ValueError(f"unknown check `{name}`; {did_you_mean(name, there)}")
    return name


Check = Annotated[str, AfterValidator(_check)]
"""A parameter that names a check of `peft-harness check`."""


@measure("property")
def conforms(method: Method, check: Check, implementation: str = "reference") -> MeasureResult:
    """Check whether an implementation passes one check in all float32 examples of the parity suite.

    The reference computes the expected results in float64. The tolerances are those of `peft-harness check`.
    """
    from harness.conformance import parity_suite
    from harness.conformance.case_selection import FEW
    from harness.conformance.execution import suite_run
    from harness.methods.registry import discover
    from harness.records.record import Outcome

    plan = parity_suite.load(method)
    if check not in plan.checks:
        raise ValueError(f"the parity suite of {method} has no check `{check}`; it has {', '.join(plan.checks)}")
    plan = plan.model_copy(update={"checks": [check]})
    one = discover().find("method", method, implementation)
    results = [o.result for case in plan.cases(FEW, ["float32"]) for o in suite_run.run_case(one, plan, case)]
    tried = [r for r in results if r.outcome is not Outcome.SKIPPED]
    if not tried:
        why = results[0].detail if results else "its parity suite has no case in float32"
        raise NotRunError(f"`{implementation}` offers no case of {method}: {why}")
    failed = [r for r in tried if r.outcome is Outcome.FAIL]
    shares = [r.error / r.allowed for r in tried if r.error is not None and r.allowed]
    worst = f", largest error {max(shares):.2g} of the tolerance" if shares else ""
    passed = f"{len(tried) - len(failed)} of {len(tried)} cases in float32 pass `{check}`{worst}"
    return MeasureResult(not failed, f"{passed}: {failed[0].detail}" if failed and failed[0].detail else passed)
