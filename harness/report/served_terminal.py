"""Terminal output of `check --served`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.conformance.served.report import SubjectVerdict
from harness.console import align_columns

if TYPE_CHECKING:
    from harness.conformance.served.report import PhaseResult, ServedReport, SubjectResult

_HEAD = [
    "adapter", "answers", "requests", "wrong", "max |Δ|", "mean |Δ|", "mean exp|Δ|", "tokens", "differ", "ties",
]  # fmt: skip
_SIGNS = {
    SubjectVerdict.CONFORMS: "✓",
    SubjectVerdict.NONCONFORMING: "✗",
    SubjectVerdict.CANNOT_TELL: "?",
    SubjectVerdict.NOT_COMPARED: "!",
}


def lines(report: ServedReport) -> list[str]:
    """Return the table of metrics, one verdict per adapter, and the reason if the requests stopped early."""
    rows = [_HEAD, *(_row(one, phase) for one in report.subjects for phase in one.phases)]
    found = align_columns(rows, right=range(2, len(_HEAD)), indent="")
    found.append("Δ: log-probability of the server minus that of the float64 reference, in nats")
    for one in report.subjects:
        found += _verdict(one, report.dtype)
    found += [f"✗ {text}" for text in report.findings]
    found += [f"not offered by the server: {what}: {why}" for what, why in report.not_offered.items()]
    found += [f"note: {text}" for text in report.notes]
    if report.stopped:
        found += ["stopped: results so far", *(f"  {line}" for line in report.stopped.split("\n"))]
    return found


def _row(one: SubjectResult, phase: PhaseResult) -> list[str]:
    return [
        one.name or "base", phase.phase.value, str(phase.requests), str(phase.wrong), f"{phase.largest:.1e}",
        f"{phase.mean:.1e}", f"{phase.mean_exp:.6f}", str(phase.tokens), str(phase.differ), str(phase.ties),
    ]  # fmt: skip


def _verdict(one: SubjectResult, dtype: str) -> list[str]:
    head = f"{_SIGNS[one.verdict]} {one.name or 'base'}: {one.verdict.value}"
    if one.allowed is None:
        return [f"{head}: {one.reason}"]
    allowed = f"allowed: {one.allowed.largest:.1e} nats in {dtype}"
    if one.finding is not None:
        wrong = ", ".join(f"{p.wrong} of {p.requests} {p.phase.value}" for p in one.phases if p.wrong)
        found = [f"{head}: wrong answers: {wrong or 'all together'}; {one.finding.cause} ({allowed})"]
        return [*found, f"    worst: {one.finding.worst}", f"    again: {one.finding.request}"]
    if one.notices is None:
        return [f"{head} ({allowed})"]
    if one.verdict is SubjectVerdict.CANNOT_TELL:
        return [
            f"{head}: a scaling that is wrong by {one.notices:.0%} would not show ({allowed}); the adapter is too weak"
        ]
    return [f"{head}; a scaling that is wrong by {100 * one.notices:.1g} % would show ({allowed})"]
