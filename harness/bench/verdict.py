"""Whether what the checks found allows a speed to be told. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from harness.bench.results import Outcome
from harness.conformance.findings import defects
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus


def standing(parity: Sequence[CheckOutcome]) -> tuple[list[CheckOutcome], Outcome, str]:
    """Return the results with known defects marked, what becomes of the benchmark, and why if it is not measured.

    Every check must have passed. The one exception: 8-bit codes of a library that are not the nearest, where that is a
    known defect of it; the time is told, and the defect with it. What a check skips because it does not apply says nothing,
    but nothing passed is no parity.
    """
    marked = defects.explained(parity, defects.known())[0]
    for one in marked:
        if one.standing is CheckStatus.FAIL:
            return marked, "refused", f"no parity: {one.implementation} fails {one.result.check}: {_said(one)}"
    for one in marked:
        if one.standing is CheckStatus.UNSUPPORTED:
            return marked, "not-run", f"{one.implementation}: {one.result.detail}"
    for one in marked:
        if one.standing is CheckStatus.KNOWN_DEFECT and one.check != "output_codes":
            return marked, "refused", f"no parity: {one.implementation}, known defect {one.defect}"
    for name in dict.fromkeys(one.implementation for one in marked):
        if not any(one.standing is CheckStatus.PASS for one in marked if one.implementation == name):
            return marked, "refused", f"no parity: no check could judge {name}"
    return marked, "measured", ""


def _said(one: CheckOutcome) -> str:
    if one.result.error is not None:
        return f"error {one.result.error:.3g}, allowed {one.result.allowed or 0:.3g}, at {one.result.tensor}"
    return defects.said(one.result)
