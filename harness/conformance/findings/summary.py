"""Summarise outcomes for the matrix that `check` prints, and describe failures. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.methods.registry import DTYPES
from harness.records.check import CheckId, CheckResult

_WORST_FIRST = (
    CheckStatus.FAIL,
    CheckStatus.KNOWN_DEFECT,
    CheckStatus.PASS,
    CheckStatus.UNSUPPORTED,
    CheckStatus.SKIPPED,
)


@dataclass(frozen=True)
class MatrixField:
    """One field of the matrix that `check` prints: the outcomes for one implementation, one target and one dtype.

    A target is a Method, an Operation, a quantised base or the loaders.
    """

    status: CheckStatus
    """The worst status in the field."""
    count: int
    """Number of outcomes with the worst status."""
    total: int
    """Number of outcomes that were compared, or of all outcomes if none was compared."""
    share: float | None
    """Largest error of the checks that passed, divided by the allowed error. None if none of them measured an error."""


def rows(tried: Iterable[CheckOutcome]) -> dict[tuple[str, str], list[CheckOutcome]]:
    """Group outcomes by (target, implementation with its environment), and return the groups in sorted order."""
    found: dict[tuple[str, str], list[CheckOutcome]] = {}
    for one in tried:
        found.setdefault((one.target, one.provider), []).append(one)
    return dict(sorted(found.items()))


def dtypes(tried: Iterable[CheckOutcome]) -> list[str]:
    """Return the dtypes of the outcomes, widest first. If no outcome has a dtype, return all dtypes."""
    return sort_dtypes(one.dtype for one in tried) or list(DTYPES)


def sort_dtypes(names: Iterable[str]) -> list[str]:
    """List each dtype once, widest first."""
    found = set(names)
    return [dtype for dtype in DTYPES if dtype in found]


def select_dtype(tried: Iterable[CheckOutcome], dtype: str) -> list[CheckOutcome]:
    """Return the outcomes with this dtype, and those without any dtype.

    An outcome without a dtype, such as a crash, applies to every dtype.
    """
    return [one for one in tried if one.dtype in (dtype, "-")]


def summarise(tried: Sequence[CheckOutcome]) -> MatrixField | None:
    """Return the field of the matrix that summarises these outcomes. If there are none, return None."""
    statuses = [one.status for one in tried]
    worst = next((status for status in _WORST_FIRST if status in statuses), None)
    if worst is None:
        return None
    compared = (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT, CheckStatus.PASS)
    shares = [one.share for one in tried if one.status is CheckStatus.PASS and one.share is not None]
    total = sum(s in compared for s in statuses) or len(statuses)
    return MatrixField(worst, statuses.count(worst), total, max(shares, default=None))


def format_field(field: MatrixField | None) -> str:
    """Return the text of a field of the matrix: its status, and a number.

    For failures, it is the number of failures. For a pass, it is the largest error divided by the allowed error.
    """
    if field is None:
        return "-"
    if field.status is CheckStatus.FAIL:
        return f"FAIL {field.count}/{field.total}"
    if field.status is CheckStatus.KNOWN_DEFECT:
        return f"defect {field.count}/{field.total}"
    if field.status is CheckStatus.PASS:
        return "ok" if field.share is None else f"ok {field.share:.2f}"
    return field.status.value


def failures(tried: Iterable[CheckOutcome]) -> list[str]:
    """Return lines about the failures: implementation, check id, case, and the text of `describe`.

    One cause often fails a check in many cases. So failures of one check of a target that measured an error share a line,
    which describes the first of them. Others, such as an exception in every check, share a line if their texts are the same.
    """
    alike: dict[tuple[str, ...], list[CheckOutcome]] = {}
    for one in tried:
        if one.status is CheckStatus.FAIL:
            check = (one.target, CheckId.parse(one.result.check).check)
            same = (describe(one.result),) if one.result.error is None else check
            alike.setdefault((one.provider, *same), []).append(one)
    return [_failure(several[0], len(several) - 1) for several in alike.values()]


def _failure(one: CheckOutcome, others: int) -> str:
    more = f" and {others} more" if others else ""
    # The id of a check of a base names the Method on the base, not the base.
    base = f" {one.target}" if one.kind == "base" else ""
    return f"FAIL {one.provider}{base} {one.result.check} ({one.case}){more}: {' '.join(describe(one.result).split())}"


def describe(result: CheckResult) -> str:
    """Return one line about a result: error and allowed error, tensor, worst element, detail and policy."""
    measured = result.error is not None and result.allowed is not None
    size = f"error {result.error:.3g}, allowed {result.allowed:.3g}" if measured else ""
    place = " ".join(filter(None, [result.tensor, result.worst]))
    nonfinite = f"{result.nonfinite} elements not finite" if result.nonfinite else ""
    policy = f" [{result.policy}]" if result.policy not in ("", "exact") else ""
    return ("; ".join(filter(None, [size, place, nonfinite, result.detail])) + policy).strip()
