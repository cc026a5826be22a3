"""JUnit files for CI servers: suites of cases. A case is passed, failed, in error or skipped."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

# XML 1.0 cannot represent these characters, not even escaped.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def suite(root: ET.Element, name: str) -> ET.Element:
    """Add a test suite to `root`, and return the suite."""
    return ET.SubElement(root, "testsuite", name=clean(name))


def case(suite: ET.Element, kind: str, name: str, tag: str, message: str) -> None:
    """Add a case to a suite. kind: its `classname`. tag: `failure`, `error` or `skipped`; empty for a passed case."""
    case = ET.SubElement(suite, "testcase", classname=clean(kind), name=clean(name))
    if tag:
        ET.SubElement(case, tag, message=clean(message))


def document(root: ET.Element) -> bytes:
    """Write the counts of cases into the attributes of each suite. Return the file in UTF-8."""
    for found in root:
        for key, tag in (("tests", "testcase"), ("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
            found.set(key, str(len(list(found.iter(tag)))))
    data: bytes = ET.tostring(root, encoding="utf-8", xml_declaration=True)
    return data


def clean(text: str) -> str:
    """Return a text in which each character that XML does not allow is replaced."""
    return _NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
