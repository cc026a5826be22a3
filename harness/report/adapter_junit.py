"""Write the JUnit file of `check PATH`, which checks an adapter file. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from xml.etree import ElementTree as ET

from harness.records import files
from harness.report import junit_xml


def write_junit(adapter: str, cases: Iterable[tuple[str, str, str]], out: Path) -> None:
    """Write a JUnit file with one suite, named after the adapter.

    cases: (name, tag, message) of each case. tag: `failure`, `error` or `skipped`; empty for a passed case.
    """
    root = ET.Element("testsuites", name="peft-harness check")
    suite = junit_xml.suite(root, adapter)
    for name, tag, message in cases:
        junit_xml.case(suite, "adapter file", name, tag, message)
    files.write_atomic(out, junit_xml.document(root))
