"""Decide from the checks of two implementations whether their times may be reported. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from harness.bench.results import Outcome
from harness.conformance.findings import defects, summary
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus


def judge_parity(parity: Sequence[CheckOutcome]) -> tuple[list[CheckOutcome], Outcome, str]:
    """Return the results with known defects marked, the outcome of the benchmark, and the reason if it is not measured.

    Every check must pass. One exception: if 8-bit codes of a library are not the nearest codes and this is a known defect,
    the time is reported with the defect. Skipped checks are ignored, but an implementation needs at least one passed check.
    """
    marked = defects.explained(parity, defects.known())[0]
    for one in marked:
        if one.status is CheckStatus.FAIL:
            failure = f"{one.implementation} fails {one.result.check}: {summary.describe(one.result)}"
            return marked, "refused", f"no parity: {failure}"
    for one in marked:
        if one.status is CheckStatus.UNSUPPORTED:
            return marked, "not-run", f"{one.implementation}: {one.result.detail}"
    for one in marked:
        if one.status is CheckStatus.KNOWN_DEFECT and one.check != "output_codes":
            return marked, "refused", f"no parity: {one.implementation}, known defect {one.defect}"
    for name in dict.fromkeys(one.implementation for one in marked):
        if not any(one.status is CheckStatus.PASS for one in marked if one.implementation == name):
            return marked, "refused", f"no parity: no check applies to {name}"
    return marked, "measured", ""
