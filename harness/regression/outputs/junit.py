"""Format a gate as JUnit XML: one case per Cell and kind of finding. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from harness.analysis.comparison.baseline_rows import MEANING, ComparisonRow, FindingKind, Findings
from harness.analysis.verdict_kind import VerdictKind
from harness.regression.outputs import formatting
from harness.report import junit_xml

_TAGS = {
    VerdictKind.PASS: "",
    VerdictKind.FAIL: "failure",
    VerdictKind.NOT_RUN: "error",
    VerdictKind.INCONCLUSIVE: "skipped",
}


def render(findings: Findings) -> bytes:
    """Return one test suite per kind, and one for files that cannot be read or were changed.

    A Cell that was not run, or has an unreadable Record, is an error; an undecided row is a skipped test; all rows that are
    not judged are one skipped test.
    """
    root = ET.Element("testsuites", name="peft-harness gate")
    for kind in FindingKind:
        rows = [row for row in findings.rows if row.kind is kind]
        if not rows:
            continue
        suite = junit_xml.suite(root, kind.value)
        if not rows[0].judged:
            junit_xml.case(suite, kind.value, f"{len(rows)} rows", "skipped", MEANING[kind])
            continue
        for name, mine in _by_name(rows).items():
            worst = min((row.word for row in mine), key=formatting.ORDER.index)
            text = "; ".join(_sentence(row) for row in mine if row.word is worst)
            junit_xml.case(suite, kind.value, name, _TAGS[worst], text)
    files = junit_xml.suite(root, "files")
    for what in findings.changed:
        junit_xml.case(files, "files", what, "failure", what)
    for why in findings.unreadable:  # a Cell that it leaves without a Record is an error above
        junit_xml.case(files, "files", why, "skipped", why)
    junit_xml.case(files, "gate", "compared", "" if findings.compared else "error", findings.verdict.reason)
    return junit_xml.document(root)


def _by_name(rows: Sequence[ComparisonRow]) -> dict[str, list[ComparisonRow]]:
    found: dict[str, list[ComparisonRow]] = {}
    for row in rows:
        found.setdefault(row.name, []).append(row)
    return found


def _sentence(row: ComparisonRow) -> str:
    values = f": {change}" if (change := formatting.change(row)) else ""
    return f"{row.what}{values}: {row.reason}" if row.reason else f"{row.what}{values}"
