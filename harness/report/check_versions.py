"""Tables of `check --with`: the results of each check and known defect by version, on a page and on a terminal.

This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from harness.conformance.findings import versions
from harness.conformance.findings.outcomes import CheckStatus, in_environment
from harness.conformance.findings.versions import CheckField, CheckRow, DefectField, DefectRow
from harness.console import align_columns
from harness.errors import plural
from harness.report.formatting import Field, field, unmeasured
from harness.report.table_model import Table, column, grouped

if TYPE_CHECKING:
    from harness.conformance.findings.report import CheckReport

_MOST_LINES = 60
_SIGNS = {CheckStatus.FAIL: "✗", CheckStatus.KNOWN_DEFECT: "? known", CheckStatus.PASS: "✓"}
_TONES = {CheckStatus.FAIL: "bad", CheckStatus.KNOWN_DEFECT: "open", CheckStatus.PASS: "good"}


def anchor(target: str, provider: str) -> str:
    """Return the HTML id of the section on one implementation. It contains no space."""
    return f"checks-{target}-{provider}".replace(" ", "-")


def lines(report: CheckReport) -> list[str]:
    """Return a table of the checks whose results differ between environments.

    A last line counts the checks with the same failures in all environments. If no check ran in several environments,
    return an empty list.
    """
    if not report.compares_versions:
        return []
    checks = versions.check_rows(report.tried, report.environments)
    defects = versions.defect_rows(report.tried, report.defects, report.environments)
    rows = [[row.defect.id, *map(_defect_text, row.fields)] for row in defects if row.differs]
    rows += [[_check_name(row), *map(_check_text, row.fields)] for row in checks if row.differs]
    alike = sum(not row.differs for row in checks)
    head = ["known defect or check", *(one.label for one in report.environments)]
    found = align_columns([head, *rows[:_MOST_LINES]], indent="") if rows else ["no check differs between the versions"]
    if more := len(rows) - len(rows[:_MOST_LINES]):
        found.append(f"... and {more} more; --html and --json list all")
    if alike:
        found.append(f"{plural(alike, 'check')} with the same failures in every version: --html and --json list them")
    return ["", *found]


def section(report: CheckReport) -> dict[str, Any] | None:
    """Return the section on versions for the HTML page. If no check ran in several environments, return None."""
    if not report.compares_versions:
        return None
    checks = versions.check_rows(report.tried, report.environments)
    defects = versions.defect_rows(report.tried, report.defects, report.environments)
    return {
        "defects": _defect_table(report, [row for row in defects if row.differs], "defects-differ"),
        "checks": _check_table(report, [row for row in checks if row.differs], "checks-differ"),
        "same_defects": _defect_table(report, [row for row in defects if not row.differs], "defects-same"),
        "same_checks": _check_table(report, [row for row in checks if not row.differs], "checks-same"),
        "environments": [
            {
                "label": one.label,
                "name": one.name,
                "id": one.environment.id,
                "packages": ", ".join(one.packages) or "none",
            }
            for one in report.environments
        ],
    }


def document(report: CheckReport) -> dict[str, Any]:
    """Return the tables by version as JSON. Each list `fields` has one entry for each of `report.environments`."""
    return {
        "defects": [
            {
                "defect": row.defect.id, "versions": row.defect.versions, "differs": row.differs,
                "misdated": row.is_misdated, "fields": [vars(f) for f in row.fields],
            }
            for row in versions.defect_rows(report.tried, report.defects, report.environments)
        ],
        "checks": [
            {
                "implementation": row.implementation, "target": row.target, "check": row.check, "differs": row.differs,
                "fields": [_check_document(f) for f in row.fields],
            }
            for row in versions.check_rows(report.tried, report.environments)
        ],
    }  # fmt: skip


def _check_document(one: CheckField) -> dict[str, Any]:
    status = one.summary.status.value if one.summary is not None else "not tried"
    total = one.summary.total if one.summary is not None else 0
    return {"standing": status, "failed": len(one.failed), "total": total, "defects": list(one.defects)}


def _check_name(row: CheckRow) -> str:
    base = f" {row.target}" if not row.check.startswith(f"{row.target}/") else ""
    return f"{row.implementation}{base} {row.check}"


def _check_text(one: CheckField) -> str:
    if one.summary is None:
        return "-"
    sign = _SIGNS.get(one.summary.status, one.summary.status.value)
    return f"{sign} {len(one.failed)}/{one.summary.total}" if one.failed else sign


def _defect_text(one: DefectField) -> str:
    if not one.tried:
        return "-"
    return f"{'? known' if one.in_range else '✗'} {one.shown}/{one.tried}" if one.shown else "✓"


def _check_table(report: CheckReport, rows: Sequence[CheckRow], key: str) -> Table:
    shown = [_row(_check_name(row), _section_of(row, report), [_check_field(f) for f in row.fields]) for row in rows]
    return _table(report, key, "Checks by version", "Check", shown)


def _defect_table(report: CheckReport, rows: Sequence[DefectRow], key: str) -> Table:
    shown = [
        _row(
            row.defect.id,
            "#defects",
            [_range_field(row), *map(_defect_field, row.fields)],
        )
        for row in rows
    ]
    return _table(
        report, key, "Known defects by version", "Known defect", shown, column("range of the entry", number=False)
    )


def _section_of(row: CheckRow, report: CheckReport) -> str:
    """Return a link to the section on the implementation in the first environment in which the check fails."""
    first = next(one.label for one, field in zip(report.environments, row.fields, strict=True) if field.failed)
    return f"#{anchor(row.target, in_environment(row.implementation, first))}"


def _table(report: CheckReport, key: str, caption: str, first: str, rows: list[Table], *more: dict[str, Any]) -> Table:
    columns = [*more, *(column(one.label, number=False) for one in report.environments)]
    groups = [("", rows)] if rows else []
    return grouped(f"versions-{key}", caption, columns, groups, first=first, by="", file=f"check-versions-{key}")


def _row(name: str, href: str, fields: list[Field]) -> Table:
    return {"name": name, "title": name, "anchor": "", "record": "", "href": href, "fields": fields}


def _check_field(one: CheckField) -> Field:
    if one.summary is None:
        return unmeasured("not tried")
    status = one.summary.status
    small = f"{len(one.failed)} of {one.summary.total}" if one.failed else ""
    text = _SIGNS.get(status, status.value)
    return field(
        text,
        f"{status.value} {small}".strip(),
        small=small,
        tone=_TONES.get(status, "quiet"),
        why=", ".join(one.defects),
    )


def _range_field(row: DefectRow) -> Field:
    why = "a version in this table contradicts the range" if row.is_misdated else ""
    return field(
        row.defect.versions, row.defect.versions, tone="bad" if why else "", flag="range" if why else "", why=why
    )


def _defect_field(one: DefectField) -> Field:
    if not one.tried:
        return unmeasured("no case was tried that could show it, or each failed in another way")
    if not one.shown:
        return field("✓", "absent", tone="good", why="does not show")
    why = "" if one.in_range else "shows, although the range of the entry does not contain this version"
    small = f"{one.shown} of {one.tried}"
    return field(
        "? known" if one.in_range else "✗",
        f"shows {small}",
        small=small,
        tone="open" if one.in_range else "bad",
        why=why,
    )
