"""What `check` found as a JUnit file, for the CI servers that draw one. No torch."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree as ET

from harness import store
from harness.conformance import summary
from harness.conformance.tried import Standing, Tried

if TYPE_CHECKING:
    from harness.conformance.command import Report

# What XML 1.0 cannot hold, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def render(report: Report) -> bytes:
    """Return one suite per implementation of a method or operation, and one for what befell whole plug-ins.

    A known defect is a skipped test, as an expected failure is in pytest's files.
    """
    root = ET.Element("testsuites", name="peft-harness check")
    for (target, implementation), tried in summary.rows(report.tried).items():
        suite = ET.SubElement(root, "testsuite", name=_clean(f"{target} by {implementation}"))
        for one in tried:
            _case(suite, f"{implementation}.{target}", f"{one.result.check} ({one.case})", *_outcome(one))
    rest = ET.SubElement(root, "testsuite", name="peft-harness")
    for name, why in report.broken.items():
        _case(rest, "plug-ins", name, "error", why)
    for complaint in report.complaints:
        _case(rest, "known defects", complaint.split()[2], "failure", complaint)
    for name, why in report.skipped.items():
        _case(rest, "not checked", name, "skipped", why)
    for suite in root:
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            suite.set(key, str(len(list(suite.iter(tag)))))
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def write_junit(report: Report, out: Path) -> None:
    """Write the file, whole or not at all."""
    store.write_atomic(out, render(report))


def _outcome(one: Tried) -> tuple[str, str]:
    if one.standing is Standing.FAIL:
        return "failure", summary.told(one)
    if one.standing is Standing.KNOWN_DEFECT:
        return "skipped", f"known defect {one.defect}: {summary.told(one)}"
    return ("", "") if one.standing is Standing.PASS else ("skipped", one.result.detail)


def _case(suite: ET.Element, kind: str, name: str, tag: str, message: str) -> None:
    case = ET.SubElement(suite, "testcase", classname=_clean(kind), name=_clean(name))
    if tag:
        ET.SubElement(case, tag, message=_clean(message))


def _clean(text: str) -> str:
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
