"""The matrix of `check`: what stands in each of its fields, and how a failure is told. No torch."""

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
    """One field of the matrix: the worst standing in it, how many results have that, of how many that were compared.

    share: the worst error of those that passed, as a share of what was allowed; None where nothing was measured.
    """

    standing: CheckStatus
    count: int
    total: int
    share: float | None


def rows(tried: Iterable[CheckOutcome]) -> dict[tuple[str, str], list[CheckOutcome]]:
    """Group results by (target, implementation), sorted."""
    found: dict[tuple[str, str], list[CheckOutcome]] = {}
    for one in tried:
        found.setdefault((one.target, one.implementation), []).append(one)
    return dict(sorted(found.items()))


def dtypes(tried: Iterable[CheckOutcome]) -> list[str]:
    """List the dtypes of the results, widest first; all of them if nothing got as far as a dtype."""
    return sort_dtypes(one.dtype for one in tried) or list(DTYPES)


def sort_dtypes(there: Iterable[str]) -> list[str]:
    """List each dtype of `there` once, widest first."""
    found = set(there)
    return [dtype for dtype in DTYPES if dtype in found]


def select_dtype(tried: Iterable[CheckOutcome], dtype: str) -> list[CheckOutcome]:
    """Return what was tried in a dtype, and what befell the whole implementation: a crash is in every field of its row."""
    return [one for one in tried if one.dtype in (dtype, "-")]


def summarise(tried: Sequence[CheckOutcome]) -> MatrixField | None:
    """Sum up one field; None if nothing was tried."""
    standings = [one.standing for one in tried]
    worst = next((standing for standing in _WORST_FIRST if standing in standings), None)
    if worst is None:
        return None
    compared = (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT, CheckStatus.PASS)
    shares = [one.share for one in tried if one.standing is CheckStatus.PASS and one.share is not None]
    total = sum(s in compared for s in standings) or len(standings)
    return MatrixField(worst, standings.count(worst), total, max(shares, default=None))


def format_field(field: MatrixField | None) -> str:
    """Say what stands in a field: the standing, and how much of what was allowed the worst error used."""
    if field is None:
        return "-"
    if field.standing is CheckStatus.FAIL:
        return f"FAIL {field.count}/{field.total}"
    if field.standing is CheckStatus.KNOWN_DEFECT:
        return f"defect {field.count}/{field.total}"
    if field.standing is CheckStatus.PASS:
        return "ok" if field.share is None else f"ok {field.share:.2f}"
    return field.standing.value


def describe_failure(one: CheckOutcome) -> str:
    """Say in one line what failed, where, and by how much."""
    # A quantisation of the base is checked under a Method, whose name the check's id has.
    base = f" {one.target}" if one.kind == "base" else ""
    return f"FAIL {one.implementation}{base} {one.result.check} ({one.case}): {' '.join(describe(one.result).split())}"


def describe(r: CheckResult) -> str:
    """Describe a result in one line: error and allowance, tensor, worst element, detail, policy."""
    size = f"error {r.error:.3g}, allowed {r.allowed:.3g}" if r.error is not None and r.allowed is not None else ""
    place = " ".join(filter(None, [r.tensor, r.worst]))
    nonfinite = f"{r.nonfinite} elements not finite" if r.nonfinite else ""
    policy = f" [{r.policy}]" if r.policy not in ("", "exact") else ""
    return ("; ".join(filter(None, [size, place, nonfinite, r.detail])) + policy).strip()
