"""Format the result of a regression gate as JUnit XML: one case per Cell and kind of finding. Imports no torch."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from harness.analysis.comparison.baseline_rows import MEANING, ComparisonRow, GateResult, RowKind
from harness.analysis.verdict_kind import VerdictKind
from harness.regression.outputs import formatting
from harness.report import junit_xml

_TAGS = {
    VerdictKind.PASS: "",
    VerdictKind.FAIL: "failure",
    VerdictKind.NOT_RUN: "error",
    VerdictKind.INCONCLUSIVE: "skipped",
}


def render(result: GateResult) -> bytes:
    """Return a JUnit file: one test suite per kind of finding, and one for unreadable or changed files.

    A Cell that was not run, or whose only Record is unreadable, is an error. An undecided row is a skipped test. If a
    kind is not judged, all its rows together are one skipped test.
    """
    root = ET.Element("testsuites", name="peft-harness gate")
    for kind in RowKind:
        rows = [row for row in result.rows if row.kind is kind]
        by_name: dict[str, list[ComparisonRow]] = {}
        if not rows:
            continue
        suite = junit_xml.suite(root, kind.value)
        if not rows[0].judged:
            junit_xml.case(suite, kind.value, f"{len(rows)} rows", "skipped", MEANING[kind])
            continue
        for row in rows:
            by_name.setdefault(row.name, []).append(row)
        for name, named in by_name.items():
            by_severity = formatting.by_severity(named)
            worst = by_severity[0].word
            text = "; ".join(formatting.sentence(row) for row in by_severity if row.word is worst)
            junit_xml.case(suite, kind.value, name, _TAGS[worst], text)
    files = junit_xml.suite(root, "files")
    for what in result.changed:
        junit_xml.case(files, "files", what, "failure", what)
    for why in result.unreadable:  # if a Cell has no other Record, it is an error above
        junit_xml.case(files, "files", why, "skipped", why)
    junit_xml.case(files, "gate", "compared", "" if result.compared else "error", result.verdict.reason)
    return junit_xml.document(root)
