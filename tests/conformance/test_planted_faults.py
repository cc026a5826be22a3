"""The list of planted faults, without a run of any check."""

from __future__ import annotations

from pathlib import Path

import harness.conformance
from harness.conformance import checks, faults, self_test
from harness.conformance.faults import PatchedCopy


def test_the_manual_says_how_many_faults_are_planted() -> None:
    manual = (Path(harness.conformance.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert f"| {len(faults.every()):,} planted by the authors of the checks" in manual


def test_every_fault_has_a_name_of_its_own_and_an_expected_check_that_exists() -> None:
    named = [(fault.target, fault.name) for fault in faults.every()]
    assert len(named) == len(set(named))
    assert {check for fault in faults.every() for check in fault.expected} <= set(checks.every())
    assert all(fault.expected for fault in faults.every())


def test_every_fault_finds_the_code_that_it_replaces() -> None:
    for fault in faults.every():
        fault.spoil(PatchedCopy(self_test.source_module(fault.target)))  # LookupError names the code that is not there
