"""Summary of outcomes: the fields of the matrix of `check`, and the description of a failure. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.methods.registry import DTYPES
from harness.records.check import CheckResult

_WORST_FIRST = (
    CheckStatus.FAIL,
    CheckStatus.KNOWN_DEFECT,
    CheckStatus.PASS,
    CheckStatus.UNSUPPORTED,
    CheckStatus.SKIPPED,
)


@dataclass(frozen=True)
class MatrixField:
    """One field of the matrix."""

    status: CheckStatus
    """The worst status in the field."""
    count: int
    """Number of outcomes with that status."""
    total: int
    """Number of outcomes that were compared; number of all outcomes if none was compared."""
    share: float | None
    """Largest error of the checks that passed, as a share of the allowance; None if nothing was measured."""


def rows(tried: Iterable[CheckOutcome]) -> dict[tuple[str, str], list[CheckOutcome]]:
    """Group outcomes by (target, implementation); the groups are sorted."""
    found: dict[tuple[str, str], list[CheckOutcome]] = {}
    for one in tried:
        found.setdefault((one.target, one.implementation), []).append(one)
    return dict(sorted(found.items()))


def dtypes(tried: Iterable[CheckOutcome]) -> list[str]:
    """List the dtypes of the outcomes, widest first; all dtypes if no outcome has one."""
    return sort_dtypes(one.dtype for one in tried) or list(DTYPES)


def sort_dtypes(names: Iterable[str]) -> list[str]:
    """List each dtype once, widest first."""
    found = set(names)
    return [dtype for dtype in DTYPES if dtype in found]


def select_dtype(tried: Iterable[CheckOutcome], dtype: str) -> list[CheckOutcome]:
    """Return the outcomes in a dtype, and the outcomes without a dtype: a crash counts in every field of its row."""
    return [one for one in tried if one.dtype in (dtype, "-")]


def summarise(tried: Sequence[CheckOutcome]) -> MatrixField | None:
    """Return the summary of one field; None if nothing was tried."""
    statuses = [one.status for one in tried]
    worst = next((status for status in _WORST_FIRST if status in statuses), None)
    if worst is None:
        return None
    compared = (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT, CheckStatus.PASS)
    shares = [one.share for one in tried if one.status is CheckStatus.PASS and one.share is not None]
    total = sum(s in compared for s in statuses) or len(statuses)
    return MatrixField(worst, statuses.count(worst), total, max(shares, default=None))


def format_field(field: MatrixField | None) -> str:
    """Format a field as its status with the number of failures, or with the largest error as a share of the allowance."""
    if field is None:
        return "-"
    if field.status is CheckStatus.FAIL:
        return f"FAIL {field.count}/{field.total}"
    if field.status is CheckStatus.KNOWN_DEFECT:
        return f"defect {field.count}/{field.total}"
    if field.status is CheckStatus.PASS:
        return "ok" if field.share is None else f"ok {field.share:.2f}"
    return field.status.value


def describe_failure(one: CheckOutcome) -> str:
    """Describe a failure in one line: check, case, error, place."""
    # The id of a check of a base names the Method on the base, not the base.
    base = f" {one.target}" if one.kind == "base" else ""
    return f"FAIL {one.implementation}{base} {one.result.check} ({one.case}): {' '.join(describe(one.result).split())}"


def describe(result: CheckResult) -> str:
    """Describe a result in one line: error and allowance, tensor, worst element, detail, policy."""
    measured = result.error is not None and result.allowed is not None
    size = f"error {result.error:.3g}, allowed {result.allowed:.3g}" if measured else ""
    place = " ".join(filter(None, [result.tensor, result.worst]))
    nonfinite = f"{result.nonfinite} elements not finite" if result.nonfinite else ""
    policy = f" [{result.policy}]" if result.policy not in ("", "exact") else ""
    return ("; ".join(filter(None, [size, place, nonfinite, result.detail])) + policy).strip()
