"""`each_setting`, and calls with zeros and shared tensors: each finds the faults that it was written for."""

from __future__ import annotations

import pytest

from harness.conformance import self_test
from harness.conformance.case_selection import FEW
from harness.conformance.drawing import sample
from harness.conformance.faults import Fault, adalora, argument_values, galore, oft
from harness.conformance.parity_suite import load
from harness.errors import Exit

FAULTS = [
    *argument_values.FAULTS,
    *(one for module in (adalora, galore, oft) for one in module.FAULTS if "each_setting" in one.expected),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: f"{fault.target}-{fault.name}")
def test_the_expected_check_finds_the_fault(fault: Fault) -> None:
    assert self_test.run([fault]).exit is Exit.PASS


def test_other_settings_are_numbers_or_words_and_differ_from_the_cases() -> None:
    plan = load("galore")
    case = next(one for one in plan.cases(FEW) if one.typical)
    found = sample.other_settings(plan, case)
    assert [set(one) for one in found[:2]] == [
        {"update_gap", "scale", "beta1", "beta2", "eps", "niter"}, {"side", "train_rest"},
    ]  # fmt: skip
    assert {one["side"] for one in found[1:]} == {"reverse_std", "paper", "left", "right", "full"}
    assert all(one[name] != case.config.get(name) for one in found for name in one)
