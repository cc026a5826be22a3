"""A random walk of a correct program passes where one rounding decides an error, and a slightly wrong program fails."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance import parity_suite
from harness.conformance.execution import suite_run
from harness.conformance.tolerance_constants import EPSILON, ROUNDED_ULPS
from harness.conformance.walk import machine
from harness.conformance.walk.other_rounding import OtherRounding
from harness.methods import registry
from harness.methods.implementations.fused.methods.adalora import FusedAdaLora
from harness.records.record import CheckResult, Outcome
from reference import lora

Rules = list[tuple[str, tuple[Any, ...]]]
CASES: dict[str, tuple[parity_suite.MethodCase, Rules]] = {
    # A step computes |I - I_bar| from two numbers near 18.5 whose last places are as large as the allowed error.
    "average": (
        parity_suite.MethodCase(
            {"rank": 12, "target_rank": 1, "tinit": 0, "beta1": 0.0774, "beta2": 0.0, "orthogonality": 4.0}, "linear",
            parity_suite.CaseShape.model_validate({"tokens": 130, "in": 24, "out": 40}), "float32", model="deep",
            magnitude="large",
        ),
        [("step", (6,)), ("merge", ()), ("scheduler", (2.0,)), ("unmerge", ()), ("step", (3,))],
    ),
    # The gradient of A is a multiple of A A^T - 1, and A A^T is one number near 1.
    "regularizer": (
        parity_suite.MethodCase(
            {
                "alpha": 0.25, "rank": 1, "target_rank": 1, "total_steps": 245, "tinit": 127, "tfinal": 1, "delta_t": 42,
                "beta1": 0.01, "orthogonality": 23.2, "regularization": "squared-sum",
            }, "linear",
            parity_suite.CaseShape.model_validate({"tokens": 498, "in": 42, "out": 8}), "float32", model="wide",
            magnitude="zero-rows", weights="tiny",
        ),
        [("step", (3,)), ("step", (9,)), ("backward", (5,)), ("step", (1,))],
    ),
}  # fmt: skip
"""Name -> a case in which a correct program failed, and the rules of the failing walk that matter."""


def taken(name: str, monkeypatch: pytest.MonkeyPatch) -> CheckResult:
    """Take the walk of a case with the fused AdaLoRA, and return the result of the check `walk`."""
    case, rules = CASES[name]

    def walk(make: Callable[[int], machine.Programs], *_: int) -> machine.WalkFailedError | None:
        one = type("Walk", (machine.AdapterWalk,), {"start": staticmethod(make), "shortest": None, "repeats": 0})()
        try:
            for rule, arguments in rules:
                getattr(one, rule)(*arguments)
                one.end_of_rule()
        except machine.WalkFailedError as failure:
            return failure
        return None

    monkeypatch.setattr(machine, "walk", walk)
    fused = registry.discover().find("method", "adalora", "fused")
    [outcome] = suite_run.run_case(fused, parity_suite.load("adalora"), case, wide=True, only=["walk"])
    return outcome.result


@pytest.mark.parametrize("name", CASES)
def test_a_walk_passes_if_one_rounding_explains_its_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = taken(name, monkeypatch)
    assert result.outcome is Outcome.PASS, result


def test_a_regularizer_that_is_wrong_by_more_than_rounding_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    right = FusedAdaLora.regularizer
    monkeypatch.setattr(FusedAdaLora, "regularizer", lambda self: (1 + 2.0**-16) * right(self))
    assert taken("regularizer", monkeypatch).outcome is Outcome.FAIL


def test_a_failure_that_does_not_come_again_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = FusedAdaLora.regularizer, []

    def first_is_wrong(self: FusedAdaLora) -> Any:
        calls.append(self)
        return (2 if len(calls) == 1 else 1) * right(self)

    monkeypatch.setattr(FusedAdaLora, "regularizer", first_is_wrong)
    assert taken("regularizer", monkeypatch).outcome is Outcome.FAIL


@pytest.mark.parametrize("rules", [[("merge", ())], [("teardown", ())]], ids=["merge", "teardown"])
def test_an_earlier_doubt_does_not_explain_a_failure_that_does_not_come_again(
    rules: Rules, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, earlier = CASES["regularizer"]
    monkeypatch.setitem(CASES, "regularizer", (case, [*earlier, *rules]))
    assert taken("regularizer", monkeypatch).outcome is Outcome.PASS
    right, calls = machine.AdapterWalk._judge, []

    def last_is_wrong(self: machine.AdapterWalk, mine: dict[str, Tensor], *others: dict[str, Tensor]) -> None:
        is_last = len(self.calls) == len(earlier) + len(rules)
        if is_last and not calls:
            calls.append(self)
            mine = {name: 2 * tensor for name, tensor in mine.items()}
        right(self, mine, *others)

    monkeypatch.setattr(machine.AdapterWalk, "_judge", last_is_wrong)
    assert taken("regularizer", monkeypatch).outcome is Outcome.FAIL
    assert calls


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2.0**-5), ("float16", 2.0**-7)])
def test_a_walk_in_16_bits_does_not_excuse_a_wrong_scaling(dtype: str, error: float) -> None:
    def wrong(model: Any, config: lora.Config, generator: torch.Generator) -> Any:
        return lora.attach(model, dataclasses.replace(config, alpha=config.alpha * (1 + error)), generator)

    shape = parity_suite.CaseShape.model_validate({"tokens": 9, "in": 24, "out": 40})
    case = parity_suite.MethodCase({"rank": 8, "alpha": 16}, "linear", shape, dtype, model="wide")
    subject = registry.Implementation("wrong", "method", "lora", wrong, dtypes=registry.DTYPES)
    [outcome] = suite_run.run_case(subject, parity_suite.load("lora"), case, wide=True, only=["walk"])
    assert outcome.result.outcome is Outcome.FAIL


def test_other_rounding_moves_only_numbers_that_are_rounded() -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    with OtherRounding(0):
        exact, rounded, later = (2 * x).clone(), x * x, x.clone().mul_(x)
    assert torch.equal(exact, 2 * x)
    off = (rounded.double() - x.double().square()) / x.double().square()
    # Rounding alone reaches half a unit. A move reaches one more unit.
    assert ROUNDED_ULPS < off.abs().max() / EPSILON["float32"] <= 3 * ROUNDED_ULPS
    assert (off > 0).any()
    assert (off < 0).any()
    assert not torch.equal(rounded, x * x)
    assert not torch.equal(rounded, later)


def test_other_rounding_keeps_signs_and_stays_finite() -> None:
    small, large = torch.full((1000,), 1e-25), torch.full((1000,), 250.0, dtype=torch.float16)
    with OtherRounding(0):
        product, largest = small * small, large * 261.9
    assert (product >= 0).all()
    assert (product > 0).any()
    assert largest.isfinite().all()
