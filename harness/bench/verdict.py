"""Decide from the checks of two implementations whether their times may be reported. This module imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from harness.bench.results import BenchRow, Outcome
from harness.conformance.findings import defects, summary
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.records.check import CheckId, CheckResult
from harness.records.check import Outcome as CheckVerdict


def judge_parity(parity: Sequence[CheckOutcome]) -> tuple[list[CheckOutcome], Outcome, str]:
    """Decide whether a benchmark may be measured. Return its checks, its outcome, and the reason if it must not.

    parity: outcomes of the checks of both implementations. In the returned checks, known defects are marked. Each
    implementation must pass at least one check and fail none; skipped checks are ignored. If a check is unsupported,
    the outcome is `not-run`. One known defect does not prevent measuring, and the row names it: some libraries compute
    8-bit codes that are not the nearest codes.
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


def with_own_clock(row: BenchRow, elapsed_s: float) -> BenchRow:
    """Return the row or, if the timer of the measured process was wrong, a copy with a failed check and no samples.

    elapsed_s: seconds that passed in this process while the other process took the samples, without the seconds in which
    it changed the inputs. On a GPU the row is returned unchanged: its samples are times between events of the device,
    and the host waits between them on purpose.
    """
    if row.samples is None or row.device != "cpu" or not row.samples.disagrees(elapsed_s):
        return row
    because = (
        f"the timer of the measured process is wrong: its calls add up to {row.samples.total_s:.3g} s, but the parent "
        f"process measured {elapsed_s:.3g} s"
    )
    found = CheckResult(
        check=str(CheckId(row.name, "timer", row.dtype, "call")), outcome=CheckVerdict.FAIL, detail=because
    )
    failure = CheckOutcome(
        implementation=f"{row.ours} or {row.other}", kind="operation", target=row.name, dtype=row.dtype, case=row.shape,
        result=found,
    )  # fmt: skip
    changes = {"outcome": "refused", "samples": None, "ceilings": None, "because": because}
    return row.model_copy(update={**changes, "parity": [*row.parity, failure]})
