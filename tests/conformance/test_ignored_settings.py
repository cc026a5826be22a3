"""`each_setting`, and calls with zeros and shared tensors: each finds the faults that it was written for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from harness.conformance import self_test
from harness.conformance.case_selection import FEW
from harness.conformance.drawing import sample
from harness.conformance.execution import suite_run
from harness.conformance.faults import Fault, adalora, argument_values, galore, lora, oft
from harness.conformance.parity_suite import load
from harness.errors import Exit, Unsupported
from harness.methods.registry import Implementation
from harness.records.record import Outcome
from reference import oft as reference

FAULTS = [
    *argument_values.FAULTS,
    *(one for module in (adalora, galore, lora, oft) for one in module.FAULTS if "each_setting" in one.expected),
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


def _refuses() -> None:
    raise Unsupported("a rotated layer stays")


def _leaves_its_layers() -> None:
    """Detach nothing, which the check `detach` reports."""


@pytest.mark.parametrize("detach", [_refuses, _leaves_its_layers])
def test_a_check_that_fails_with_the_usual_settings_hides_no_ignored_setting(
    detach: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def attach(model: nn.Module, config: reference.Config, generator: torch.Generator) -> Any:
        adapted = reference.attach(model, replace(config, terms=5), generator)
        monkeypatch.setattr(adapted, "detach", detach)
        return adapted

    plan = load("oft").model_copy(update={"checks": ["each_setting"]})
    case = replace(next(one for one in load("oft").cases(FEW) if one.typical), config={"block_size": 4, "terms": 5})
    (found,) = suite_run.run_case(Implementation("mine", "method", "oft", attach, dtypes=("float32",)), plan, case)
    assert found.result.outcome is Outcome.FAIL
    assert "with terms=" in found.result.detail
