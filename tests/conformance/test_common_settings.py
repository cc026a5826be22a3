"""Tests of the settings that the failing cases of a check have in common."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from torch import Tensor

from harness.conformance.execution import suite_run
from harness.conformance.findings import common_settings
from harness.conformance.findings.outcomes import CheckOutcome
from harness.methods.registry import Implementation
from harness.records.check import CheckResult, Outcome
from reference.operations import double_quant


def outcome(failed: bool, *, check: str = "outputs", dtype: str = "float32", **settings: Any) -> CheckOutcome:
    result = CheckResult(
        check=f"lora_linear/{check}/{dtype}/call", outcome=Outcome.FAIL if failed else Outcome.PASS, detail="wrong"
    )
    return CheckOutcome(
        implementation="acme", kind="operation", target="lora_linear", dtype=dtype, case=str(settings), result=result,
        settings=settings,
    )  # fmt: skip


RANKS = (1, 3, 16, 65, 128, 130, 160, 260)
SIZES = range(4)
"""Values of a setting that does not matter. With each of them, there are enough cases to tell."""


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        (
            [outcome(rank > 128, rank=rank, n=n) for rank in RANKS for n in SIZES],
            "fails in 12 of 32 cases: exactly those with rank >= 130",
        ),
        (
            [outcome(rank in (130, 160, 1030), rank=rank, n=n) for rank in (*RANKS, 1030) for n in SIZES],
            "fails in 12 of 36 cases, all with rank >= 130 (4 such cases pass)",
        ),
        (
            [outcome(rank % 16 > 0, rank=rank, n=n) for rank in (16, 3, 64, 65, 128, 130, 160, 1) for n in SIZES],
            "fails in 16 of 32 cases: exactly those with rank not a multiple of 4",
        ),
        (
            [outcome(rank % 16 == 0, rank=rank, n=n) for rank in (16, 3, 48, 65, 112, 130, 161, 1) for n in SIZES],
            "fails in 12 of 32 cases: exactly those with rank a multiple of 16",
        ),
        (
            [
                outcome(not bias and rank > 16, rank=rank, bias=bias, n=n)
                for rank in RANKS for bias in (True, False) for n in "abcd"
            ],
            "fails in 20 of 64 cases: exactly those with bias=False and rank >= 65",
        ),
        (
            [
                outcome(side in ("left", "right"), side=side, n=n)
                for side in ("left", "right", "std", "full") for n in range(9)
            ],
            "fails in 18 of 36 cases: exactly those with side=left or right",
        ),
        (
            [
                outcome(max(shape) > 64, shape=shape, n=n)
                for shape in ([8, 8], [65, 3], [3, 66], [64, 64], [9, 70], [1, 1]) for n in SIZES
            ],
            "fails in 12 of 24 cases: exactly those with largest of shape >= 65",
        ),
        (
            [outcome(dtype == "float16", dtype=dtype, n=n) for dtype in ("float32", "float16") for n in range(16)],
            "fails in 16 of 32 cases: exactly those with dtype=float16",
        ),
        ([outcome(True, rank=rank) for rank in RANKS], "fails in every case (8)"),
        # Ranks between those that pass.
        ([outcome(rank in (3, 65, 160), rank=rank, n=n) for rank in RANKS for n in SIZES], "fails in 12 of 32 cases"),
        # Three of eight random cases have the largest ranks by chance once in 56 times.
        ([outcome(rank > 128, rank=rank) for rank in RANKS], "fails in 3 of 8 cases"),
    ],
)  # fmt: skip
def test_the_failing_cases_have_a_setting_that_most_others_lack(cases: list[CheckOutcome], words: str) -> None:
    (found,) = common_settings.find(cases)
    assert str(found) == words
    assert (found.implementation, found.target, found.check) == ("acme", "lora_linear", "outputs")


def test_conditions_that_hold_by_chance_are_rare() -> None:
    generator = random.Random(0)  # no secret
    names = "abcdefghijkl"

    def conditions(failing: int, passing: int) -> int:
        drawn = [{name: generator.choice((1, 2, 5, 9, "x", True)) for name in names} for _ in range(failing + passing)]
        cases = [outcome(index < failing, number=index, **one) for index, one in enumerate(drawn)]
        return sum(bool(one.conditions) for one in common_settings.find(cases))

    # `number` tells the failing cases apart, so it counts only where so many cases cannot be the first by chance.
    assert sum(conditions(3, passing) for passing in (3, 6, 10, 15) for _ in range(25)) <= 5


@pytest.mark.parametrize("odd", [None, math.nan, {"a": 1}, [1.5], [None], {1, 2}, "", [], True])
def test_an_odd_value_meets_no_condition_and_raises_nothing(odd: Any) -> None:
    cases = [outcome(rank > 128, rank=rank, odd=odd, n=n) for rank in RANKS for n in SIZES]
    cases += [outcome(False, rank=odd, n=n) for n in SIZES] + [outcome(False, other=n) for n in SIZES]
    (found,) = common_settings.find(cases)
    assert str(found) == "fails in 12 of 40 cases: exactly those with rank >= 130"


def test_known_defects_count_as_failures_and_single_cases_and_drawn_ones_not_at_all() -> None:
    known = outcome(True, rank=3).model_copy(update={"defect": "acme-wrong"})
    (found,) = common_settings.find([known, outcome(True, rank=4), outcome(False, rank=5)])
    assert str(found) == "fails in 2 of 3 cases"
    assert common_settings.find([outcome(True, rank=3)]) == []
    assert common_settings.find([outcome(True, rank=3), outcome(True).model_copy(update={"case": "drawn"})]) == []


def test_checks_are_apart_and_the_one_that_fails_most_comes_first() -> None:
    cases = [outcome(rank > 65, rank=rank) for rank in RANKS]
    cases += [outcome(True, check="calls", rank=3), outcome(False, check="calls", rank=4)]
    cases += [outcome(rank > 3, check="backward", rank=rank) for rank in RANKS]
    assert [(one.check, one.failing) for one in common_settings.find(cases)] == [
        ("backward", 6), ("outputs", 4), ("calls", 1),
    ]  # fmt: skip


def test_a_setting_that_only_the_same_cases_have_is_named_too() -> None:
    cases = [outcome(rank == 16, rank=rank, dropout=0.25 * (rank == 16), n=n) for rank in RANKS for n in SIZES]
    (found,) = common_settings.find(cases)
    assert str(found).endswith("exactly those with rank=16 (in these cases the same as dropout=0.25)")


def test_the_settings_of_real_cases_include_those_with_default_values() -> None:
    def wrong(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> Tensor:
        decoded = double_quant.dequantize(codes, absmax2, offset, block)
        return decoded * 1.01 if block == 256 else decoded

    tried = suite_run.run(Implementation("acme", "operation", "double_dequantize", wrong))
    found = {one.check: one for one in common_settings.find(tried)}
    # `block=256` is the default, which the names of most cases leave out.
    assert found["outputs"].conditions == ("block=256",)
    assert found["outputs"].others == 0
