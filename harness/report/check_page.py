"""HTML page of the command `check`, in the style of a run's report. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.analysis.grouping import group
from harness.conformance.findings import defects, summary
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.errors import EXITS, Exit, plural
from harness.report import check_settings, check_versions, formatting, html
from harness.report.formatting import check_fields, field, unmeasured
from harness.report.table_model import column, grouped
from harness.report.tones import badge, icon, tone

if TYPE_CHECKING:
    from harness.conformance.findings.defects import Defect
    from harness.conformance.findings.report import CheckReport

TEMPLATE = "conformance.html.j2"
_OF_LOOP = "Does this training loop train as the recipe says?"
_WORDS = {
    Exit.PASS: "pass", Exit.FAIL: "fail", Exit.INFRASTRUCTURE: "not all tried", Exit.NOTHING_COMPARED: "nothing compared",
}  # fmt: skip
_NAMES = {CheckStatus.PASS: "passed", CheckStatus.FAIL: "failed", CheckStatus.KNOWN_DEFECT: "by known defects"}


def render(report: CheckReport) -> str:
    """Return the page as HTML."""
    return html.fill(TEMPLATE, build(report))


def write_page(report: CheckReport, out: Path) -> None:
    """Write the page to `out`. If this fails, `out` stays as it was."""
    html.write_page(render(report), out)


def build(report: CheckReport) -> dict[str, Any]:
    """Return the content of the page as one dict of plain values."""
    word = "interrupted" if report.interrupted else _WORDS[report.exit]
    plans = sorted(report.plans.items())
    return {
        "verdict": badge(word) | {"exit": f"exit code {int(report.exit)}"},
        "reason": EXITS[report.exit] if report.exit is Exit.NOTHING_COMPARED else _reason(report),
        "counts": [
            {**badge(status), "count": f"{count:,}", "word": _NAMES.get(status, status.value)}
            for status in CheckStatus
            if (count := report.count(status))
        ],
        "alerts": _alerts(report),
        "matrix": _matrix(report),
        "heading": _OF_LOOP if report.settings else "Do implementations compute what the papers say?",
        "settings": check_settings.section(report),
        "versions": check_versions.section(report),
        "in_common": [f"{one.implementation} {one.target}: {one.check} {one}" for one in report.in_common()],
        "failures": [_failed(one) for one in report.tried if one.status is CheckStatus.FAIL],
        "defects": [_defect(defect, report) for defect in report.shown_defects()],
        "checks": [_by_check(*key, tried) for key, tried in summary.rows(report.tried).items()],
        "not_checked": _not_checked(report),
        "readings": [
            {"target": target, "follows": plan.follows, "checks": ", ".join(plan.checks)} for target, plan in plans
        ],
        "looser": [
            {"target": target, "check": check, "factor": f"{one.factor:g}", "because": one.because, "link": one.link}
            for target, plan in plans
            for check, one in plan.tolerances.items()
        ],
        "software": report.software,
    }


def _reason(report: CheckReport) -> str:
    failed, shown = report.count(CheckStatus.FAIL), len(report.shown_defects())
    parts = [
        f"{plural(failed, 'check')} failed" if failed else "no check failed unexpectedly",
        f"{plural(shown, 'known defect')} of libraries showed" if shown else "",
        f"requested, but not tried: {', '.join(report.untried)}" if report.untried else "",
        "interrupted: results so far" if report.interrupted else "",
    ]
    return formatting.sentence("; ".join(filter(None, parts)))


def _alerts(report: CheckReport) -> list[dict[str, Any]]:
    crashes = [one for one in report.tried if one.check == "alive"]
    found = {
        "Plug-ins that could not be loaded": [f"{name}: {why}" for name, why in report.broken.items()],
        "Known defects that did not show": report.complaints,
        "Implementations that crashed or hung": [
            f"{one.provider} {one.target} ({one.case}): {one.result.detail}" for one in crashes
        ],
    }
    return [{"text": text, "items": items} for text, items in found.items() if items]


def _matrix(report: CheckReport) -> dict[str, Any]:
    dtypes = summary.dtypes(report.tried)
    groups: dict[str, list[dict[str, Any]]] = {}
    for (target, implementation), tried in summary.rows(report.tried).items():
        row = {
            "name": implementation, "title": f"{target} by {implementation}", "anchor": "", "record": "",
            "href": f"#{check_versions.anchor(target, implementation)}",
            "fields": [_field(summary.select_dtype(tried, dtype)) for dtype in dtypes],
        }  # fmt: skip
        groups.setdefault(target, []).append(row)
    columns = [column(dtype, number=False) for dtype in dtypes]
    caption = "Implementations by target and dtype"
    return grouped(
        "matrix",
        caption,
        columns,
        groups.items(),
        first="Implementation",
        by="Target",
        file="check-matrix",
        example="lora fused",
    )


def _field(tried: list[CheckOutcome]) -> dict[str, Any]:
    worst = summary.summarise(tried)
    if worst is None:
        return unmeasured("no case in this dtype")
    status, colour = worst.status, tone(worst.status)
    if status is CheckStatus.PASS:
        if worst.share is None:
            return field(f"{icon(status)} pass", "pass", tone=colour)
        small = f"{worst.share:.2f}"
        return field(f"{icon(status)} pass", f"pass {small}", small=small, tone=colour, more={"share": worst.share})
    if status in (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT):
        small = f"{worst.count} of {worst.total}"
        return field(f"{icon(status)} {status.value}", f"{status.value} {small}", small=small, tone=colour)
    return field(status.value, None, tone=colour, why=_reasons(tried))


def _reasons(tried: Iterable[CheckOutcome]) -> str:
    return "; ".join(sorted({one.result.detail for one in tried if one.result.detail})[:3])


def _failed(one: CheckOutcome) -> dict[str, str]:
    href = f"#{check_versions.anchor(one.target, one.provider)}"
    return check_fields(one.result) | {"implementation": one.provider, "case": one.case, "href": href}


def _defect(defect: Defect, report: CheckReport) -> dict[str, Any]:
    shown = [one for one in report.tried if one.defect == defect.id]
    worst = max(shown, key=lambda one: one.share or 0.0)
    reproduction = defects.path().parent / defect.reproduction
    return {
        **defect.model_dump(mode="json"), "count": len(shown), "source": reproduction.read_text(encoding="utf-8"),
        "summary": formatting.sentence(defect.summary),
        "worst": {"check": worst.result.check, "case": worst.case, "result": summary.describe(worst.result)},
        "installed": ", ".join(_versions(defect, shown, report)),
    }  # fmt: skip


def _versions(defect: Defect, shown: Iterable[CheckOutcome], report: CheckReport) -> list[str]:
    """Return the versions of the defect's library in the environments of the outcomes `shown`, each once."""
    software = {one.label: one.environment.software for one in report.environments}
    here = {library: number for one in software.values() for library, number in one.items()} | report.software
    software[""] = (
        here  # an outcome without a label may be of an environment that holds a library which this Python lacks
    )
    found = (software[one.environment].get(defect.library, "") for one in shown)
    return list(dict.fromkeys(filter(None, found)))


def _by_check(target: str, implementation: str, tried: list[CheckOutcome]) -> dict[str, Any]:
    """Return the section on one implementation. Each row is a check, with the worst result in each dtype."""
    dtypes = summary.dtypes(tried)
    checks = group((one.check, one) for one in tried)
    rows = [
        {"name": name, "fields": [_field(summary.select_dtype(same, dtype)) for dtype in dtypes]}
        for name, same in checks.items()
    ]
    whole = summary.summarise(tried)
    status = whole.status if whole is not None else CheckStatus.SKIPPED
    return badge(status) | {
        "anchor": check_versions.anchor(target, implementation), "title": f"{target} by {implementation}",
        "dtypes": dtypes, "rows": rows,
        "cases": len({(one.case, one.dtype) for one in tried}), "open": status is CheckStatus.FAIL,
    }  # fmt: skip


def _not_checked(report: CheckReport) -> list[dict[str, Any]]:
    """Return one row per target (e.g. a Method) and reason why it was not checked."""
    reasons = group(
        ((f"{one.provider} {one.target}", one.status.value, f"{one.check}: {one.result.detail}"), one.dtype)
        for one in report.tried
        if one.status in (CheckStatus.UNSUPPORTED, CheckStatus.SKIPPED)
    )
    rows = [(name, "not checked", why, "", "") for name, why in report.skipped.items()]
    rows += [
        (*key, str(len(dtypes)), ", ".join(summary.sort_dtypes(dtypes))) for key, dtypes in sorted(reasons.items())
    ]
    return [dict(zip(("name", "word", "why", "count", "dtypes"), row, strict=True)) for row in rows]
