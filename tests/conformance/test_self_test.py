"""The tester, tested: `check --self-test`, and what makes it fail."""

from __future__ import annotations

import dataclasses
import json

import pytest

from harness.cli import main
from harness.conformance import checks, faults, operations, self_test
from harness.conformance.checks import Reference
from harness.conformance.faults import Fault, PatchedCopy, planted
from harness.errors import Exit
from harness.methods.spec import methods

pytestmark = pytest.mark.slow

LEAST = 40
PLAIN = {"rank": 3, "alpha": 8.0}


@planted("lora", "forward", values=PLAIN)
def changes_nothing(copy: PatchedCopy) -> None:
    copy.replace_line("R, s, p = config.rank, config.scaling", "R, s, p = config.rank, 1.0 * config.scaling")


@planted("lora", "initial", values=PLAIN)
def is_caught_by_another_check(copy: PatchedCopy) -> None:
    copy.replace_line("self.scaling * (h_TR @ self.B.T)", "2 * self.scaling * (h_TR @ self.B.T)")


@planted("lora", "forward", values=PLAIN)
def raises_an_exception(copy: PatchedCopy) -> None:
    copy.replace_line("self.scaling * (h_TR @ self.B.T)", "a_name_that_is_mistyped * (h_TR @ self.B.T)")


@planted("lora", "forward", values=PLAIN)
def changes_what_is_no_longer_there(copy: PatchedCopy) -> None:
    copy.replace_line("a line that nobody wrote", "")


SLOW_ELSEWHERE = ("walk", "calls", "each_setting")
"""Checks for which the test takes the first fault of LoRA: that of another target would take much longer."""


@pytest.mark.nightly
def test_every_fault_is_caught_by_the_checks_one_expects(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "--self-test", "--json"]) == Exit.PASS
    document = json.loads(capsys.readouterr().out)
    assert document["caught"] == document["planted"] == len(document["faults"]) >= LEAST
    assert [row for row in document["faults"] if row["missed"]] == []
    assert document["wrong"] == document["idle"] == []
    caught = {name for row in document["faults"] for name in row["caught"]}
    with_reference = {name for name, check in checks.every().items() if check.reference is not Reference.ABSENT}
    assert caught - {"attach"} == with_reference  # test_adapter_config has faults for the others
    assert {row["of"] for row in document["faults"]} >= {*methods(), *operations.every()}


def test_each_check_catches_the_first_fault_that_names_it() -> None:
    first: dict[str, Fault] = {}
    for fault in faults.every():
        for name in fault.expected:
            if name not in SLOW_ELSEWHERE or fault.target == "lora":
                first.setdefault(name, fault)
    assert first.keys() >= {*SLOW_ELSEWHERE}
    missed = []
    for name, fault in first.items():
        failures = self_test._failures(self_test._spoilt(fault), fault, [name])
        missed += [] if any(failures) else [f"{name}: {fault.target} {fault.name}"]
    assert missed == []


@pytest.mark.parametrize(
    "fault", [changes_nothing, is_caught_by_another_check, raises_an_exception], ids=lambda fault: fault.name
)
def test_a_fault_that_its_check_does_not_catch_fails(
    fault: Fault, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faults, "every", lambda: (fault,))
    assert main(["check", "--self-test"]) == Exit.FAIL
    said = capsys.readouterr().out
    assert f"NOT BY {fault.expected[0]}" in said
    assert said.endswith("0 of 1 faults caught\n")


def test_a_check_that_catches_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next(fault for fault in faults.every() if fault.name == "merges_twice")
    monkeypatch.setattr(faults, "every", lambda: (one,))
    assert main(["check", "--self-test"]) == Exit.FAIL
    said = capsys.readouterr().out
    assert "the check forward catches no fault" in said
    assert "the check merge catches no fault" not in said
    assert said.endswith("1 of 1 faults caught\n")


def test_a_reference_that_fails_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    one = next(fault for fault in faults.every() if fault.name == "returns_zeros")
    monkeypatch.setattr(
        checks, "every", lambda: {**right, "inputs": dataclasses.replace(right["inputs"], function=broken)}
    )
    report = self_test.run([one])
    assert any("inputs" in accusation for accusation in report.wrong)
    assert report.exit == Exit.FAIL


right = checks.every()


def broken(subject: object, case: object) -> None:
    raise RuntimeError("this check is broken")


def test_a_fault_follows_the_reference_or_says_that_it_does_not() -> None:
    with pytest.raises(LookupError, match=r"reference\.lora has 'a line that nobody wrote' 0 times"):
        self_test.run([changes_what_is_no_longer_there])


def test_a_planted_fault_never_touches_the_reference() -> None:
    from reference import lora

    forward = lora.LoraLinear.forward
    self_test.run([is_caught_by_another_check])
    assert lora.LoraLinear.forward is forward


def test_the_self_test_takes_no_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "reference", "--self-test"]) == Exit.USAGE
    assert "tests the checks, not an implementation" in capsys.readouterr().err
