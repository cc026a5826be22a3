"""JUnit file of the command `check`. This module imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from harness.conformance.findings import summary
from harness.conformance.findings.outcomes import CheckOutcome, CheckStatus
from harness.records import files
from harness.report import junit_xml

if TYPE_CHECKING:
    from harness.conformance.findings.report import CheckReport


def render(report: CheckReport) -> bytes:
    """Return a JUnit file: one suite per target (e.g. Method) and implementation, and one for findings without a check.

    A known defect becomes a skipped test, like an expected failure in pytest.
    """
    root = ET.Element("testsuites", name="peft-harness check")
    for (target, implementation), tried in summary.rows(report.tried).items():
        suite = junit_xml.suite(root, f"{target} by {implementation}")
        for one in tried:
            junit_xml.case(suite, f"{implementation}.{target}", f"{one.result.check} ({one.case})", *_outcome(one))
    rest = junit_xml.suite(root, "peft-harness")
    for name, why in report.broken.items():
        junit_xml.case(rest, "plug-ins", name, "error", why)
    for complaint in report.complaints:
        junit_xml.case(rest, "known defects", complaint.split()[2], "failure", complaint)
    for name, why in report.skipped.items():
        junit_xml.case(rest, "not checked", name, "skipped", why)
    return junit_xml.document(root)


def write_junit(report: CheckReport, out: Path) -> None:
    """Write the JUnit file to `out`. If this fails, `out` stays as it was."""
    files.write_atomic(out, render(report))


def _outcome(one: CheckOutcome) -> tuple[str, str]:
    if one.status is CheckStatus.FAIL:
        return "failure", summary.describe(one.result)
    if one.status is CheckStatus.KNOWN_DEFECT:
        return "skipped", f"known defect {one.defect}: {summary.describe(one.result)}"
    return ("", "") if one.status is CheckStatus.PASS else ("skipped", one.result.detail)
