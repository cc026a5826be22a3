"""HTML page of a `check`, in the style of a run's report. No torch."""

from __future__ import annotations

import datetime
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.conformance.findings import defects, summary
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.errors import EXITS, Exit
from harness.records import files
from harness.report import html
from harness.report.formatting import figure, unmeasured
from harness.report.tones import ICONS

if TYPE_CHECKING:
    from harness.conformance.findings.defects import Defect
    from harness.conformance.findings.report import CheckReport

TEMPLATE = "conformance.html.j2"
_TONES = {CheckStatus.FAIL: "bad", CheckStatus.KNOWN_DEFECT: "open", CheckStatus.PASS: "good"}
_WORDS = {
    Exit.PASS: ("pass", "good"), Exit.FAIL: ("fail", "bad"), Exit.INFRASTRUCTURE: ("not all tried", "open"),
    Exit.NOTHING_COMPARED: ("nothing compared", "open"),
}  # fmt: skip
_NAMES = {CheckStatus.PASS: "passed", CheckStatus.FAIL: "failed", CheckStatus.KNOWN_DEFECT: "by known defects"}


def render(report: CheckReport) -> str:
    """Return the page."""
    return html.fill(TEMPLATE, build(report))


def write_page(report: CheckReport, out: Path) -> None:
    """Write the page to `out`, whole or not at all."""
    files.write_atomic(out, render(report).encode(errors="backslashreplace"))


def build(report: CheckReport) -> dict[str, Any]:
    """Return the content of the page as one plain dict."""
    word, tone = ("interrupted", "open") if report.interrupted else _WORDS[report.exit]
    return {
        "verdict": {"word": word, "tone": tone, "icon": ICONS[tone], "exit": f"exit code {int(report.exit)}"},
        "reason": EXITS[report.exit] if report.exit is Exit.NOTHING_COMPARED else _reason(report),
        "counts": [
            {"tone": _tone(s), "icon": ICONS[_tone(s)], "count": report.count(s), "word": _NAMES.get(s, s.value)}
            for s in CheckStatus
            if report.count(s)
        ],
        "alerts": _alerts(report),
        "matrix": _matrix(report),
        "failures": [_failed(t) for t in report.tried if t.status is CheckStatus.FAIL],
        "defects": [_defect(defect, report) for defect in report.shown_defects()],
        "checks": [_by_check(*key, tried) for key, tried in summary.rows(report.tried).items()],
        "not_checked": _not_checked(report),
        "readings": [
            {"target": target, "follows": plan.follows, "checks": ", ".join(plan.checks)}
            for target, plan in sorted(report.plans.items())
        ],
        "looser": [
            {"target": target, "check": check, "factor": f"{one.factor:g}", "because": one.because, "link": one.link}
            for target, plan in sorted(report.plans.items())
            for check, one in plan.tolerances.items()
        ],
        "software": [{"key": key, "value": value} for key, value in report.software.items()],
        "generated": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
    }


def _reason(report: CheckReport) -> str:
    failed, shown = report.count(CheckStatus.FAIL), len(report.shown_defects())
    parts = [f"{failed} checks failed" if failed else "no check failed unexpectedly"]
    if shown:
        parts.append(f"{shown} known defects of libraries showed")
    if report.untried:
        parts.append(f"requested, but not tried: {', '.join(report.untried)}")
    if report.interrupted:
        parts.append("interrupted: results so far")
    return "; ".join(parts)


def _tone(status: CheckStatus) -> str:
    return _TONES.get(status, "quiet")


def _alerts(report: CheckReport) -> list[dict[str, Any]]:
    found = [
        ("Plug-ins that could not be loaded", [f"{name}: {why}" for name, why in report.broken.items()]),
        ("Known defects that did not show", report.complaints),
        (
            "Implementations that did not stay alive",
            [
                f"{t.implementation} {t.target} ({t.case}): {t.result.detail}"
                for t in report.tried
                if t.check == "alive"
            ],
        ),
    ]
    return [{"text": text, "items": items} for text, items in found if items]


def _matrix(report: CheckReport) -> dict[str, Any]:
    dtypes = summary.dtypes(report.tried)
    groups: dict[str, list[dict[str, Any]]] = {}
    for (target, implementation), tried in summary.rows(report.tried).items():
        row = {
            "name": implementation, "title": f"{target} by {implementation}", "anchor": "", "record": "",
            "href": f"#{_anchor(target, implementation)}",
            "figures": [_figure(summary.select_dtype(tried, dtype)) for dtype in dtypes],
        }  # fmt: skip
        groups.setdefault(target, []).append(row)
    return {
        "id": "matrix", "first": "Implementation", "notes": [],
        "caption": "Implementations by method or operation and dtype",
        "columns": [{"label": dtype, "number": False, "title": ""} for dtype in dtypes],
        "groups": [{"title": target, "rows": rows} for target, rows in groups.items()],
    }  # fmt: skip


def _figure(tried: list[CheckOutcome]) -> dict[str, Any]:
    field = summary.summarise(tried)
    if field is None:
        return unmeasured("no case in this dtype")
    tone = _tone(field.status)
    if field.status is CheckStatus.PASS:
        small = "" if field.share is None else f"{field.share:.2f}"
        return figure(f"{ICONS[tone]} pass", field.share or 0.0, small=small, tone=tone)
    if field.status in (CheckStatus.FAIL, CheckStatus.KNOWN_DEFECT):
        # Passing fields sort by their share, at most 1; failures sort above them, by their number.
        value = 1.0 + field.count
        text = f"{ICONS[tone]} {field.status.value}"
        return figure(text, value, small=f"{field.count} of {field.total}", tone=tone)
    return figure(field.status.value, None, tone=tone, why=_reasons(tried))


def _reasons(tried: Iterable[CheckOutcome]) -> str:
    return "; ".join(sorted({one.result.detail for one in tried if one.result.detail})[:3])


def _anchor(target: str, implementation: str) -> str:
    return f"checks-{target}-{implementation}"


def _failed(one: CheckOutcome) -> dict[str, str]:
    r = one.result
    return {
        "implementation": one.implementation, "check": r.check, "case": one.case, "defect": one.defect,
        "error": "" if r.error is None else f"{r.error:.3g}", "allowed": "" if r.allowed is None else f"{r.allowed:.3g}",
        "share": "" if one.share is None else f"{one.share:.3g}", "tensor": r.tensor, "worst": r.worst,
        "policy": r.policy, "detail": r.detail, "href": f"#{_anchor(one.target, one.implementation)}",
    }  # fmt: skip


def _defect(defect: Defect, report: CheckReport) -> dict[str, Any]:
    shown = [one for one in report.tried if one.defect == defect.id]
    worst = max(shown, key=lambda one: one.share or 0.0)
    reproduction = defects.path().parent / defect.reproduction
    return {
        **defect.model_dump(mode="json"), "count": len(shown), "worst": _failed(worst),
        "installed": report.software.get(defect.library, ""), "source": reproduction.read_text(encoding="utf-8"),
    }  # fmt: skip


def _by_check(target: str, implementation: str, tried: list[CheckOutcome]) -> dict[str, Any]:
    """Summarise one implementation by check, over all cases."""
    dtypes = summary.dtypes(tried)
    names = list(dict.fromkeys(one.check for one in tried))
    rows = []
    for name in names:
        mine = [one for one in tried if one.check == name]
        rows.append({"name": name, "figures": [_figure(summary.select_dtype(mine, dtype)) for dtype in dtypes]})
    whole = summary.summarise(tried)
    status = whole.status if whole is not None else CheckStatus.SKIPPED
    return {
        "anchor": _anchor(target, implementation), "title": f"{target} by {implementation}", "dtypes": dtypes, "rows": rows,
        "word": status.value, "tone": _tone(status), "icon": ICONS[_tone(status)],
        "cases": len({(one.case, one.dtype) for one in tried}), "open": status is CheckStatus.FAIL,
    }  # fmt: skip


def _not_checked(report: CheckReport) -> list[dict[str, Any]]:
    """List targets that were not tried or not compared, each reason once."""
    counts: dict[tuple[str, str, str], list[str]] = {}
    for one in report.tried:
        if one.status in (CheckStatus.UNSUPPORTED, CheckStatus.SKIPPED):
            key = (f"{one.implementation} {one.target}", one.status.value, f"{one.check}: {one.result.detail}")
            counts.setdefault(key, []).append(one.dtype)
    rows = [
        {"name": name, "word": word, "why": why, "count": len(dtypes), "dtypes": ", ".join(summary.sort_dtypes(dtypes))}
        for (name, word, why), dtypes in sorted(counts.items())
    ]
    whole = [
        {"name": n, "word": "not checked", "why": why, "count": "", "dtypes": ""} for n, why in report.skipped.items()
    ]
    return [*whole, *rows]
