"""What the failing cases of a check have in common."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("cases", "words"),
    [
        ([outcome(rank > 128, rank=rank) for rank in RANKS], "fails in 3 of 8 cases: exactly those with rank >= 130"),
        (
            [outcome(rank in (130, 160, 1030), rank=rank) for rank in (*RANKS, 1030)],
            "fails in 3 of 9 cases, all with rank >= 130 (1 such case passes)",
        ),
        (
            [outcome(rank % 16 > 0, rank=rank) for rank in (16, 3, 64, 65, 128, 130, 160, 1)],
            "fails in 4 of 8 cases: exactly those with rank not a multiple of 4",
        ),
        (
            [outcome(rank % 16 == 0, rank=rank) for rank in (16, 3, 48, 65, 112, 130, 161, 1)],
            "fails in 3 of 8 cases: exactly those with rank a multiple of 16",
        ),
        (
            [outcome(not bias and rank > 16, rank=rank, bias=bias) for rank in RANKS for bias in (True, False)],
            "fails in 5 of 16 cases: exactly those with bias=False and rank >= 65",
        ),
        (
            [outcome(side in ("left", "right"), side=side) for side in ("left", "right", "std", "full") for _ in "12"]
            + [outcome(side == "left", side=side, n=n) for side in ("left", "std", "full") for n in range(2)],
            "fails in 4 of 10 cases: exactly those with side=left or right",
        ),
        (
            [outcome(max(shape) > 64, shape=shape) for shape in ([8, 8], [65, 3], [3, 66], [64, 64], [9, 70], [1, 1])],
            "fails in 3 of 6 cases: exactly those with largest of shape >= 65",
        ),
        (
            [outcome(dtype == "float16", dtype=dtype, n=n) for dtype in ("float32", "float16") for n in range(4)],
            "fails in 4 of 8 cases: exactly those with dtype=float16",
        ),
        ([outcome(True, rank=rank) for rank in RANKS], "fails in every case (8)"),
        # Ranks between those that pass, and too few cases to tell.
        ([outcome(rank in (3, 65, 160), rank=rank) for rank in RANKS], "fails in 3 of 8 cases"),
        ([outcome(rank > 130, rank=rank) for rank in RANKS], "fails in 2 of 8 cases"),
    ],
)  # fmt: skip
def test_the_failing_cases_share_a_setting_that_most_others_lack(cases: list[CheckOutcome], words: str) -> None:
    (found,) = common_settings.find(cases)
    assert str(found) == words
    assert (found.implementation, found.target, found.check) == ("acme", "lora_linear", "outputs")


def test_a_value_of_another_kind_meets_no_condition() -> None:
    cases = [outcome(rank > 128, rank=rank) for rank in RANKS] + [outcome(False, rank=None), outcome(False, other=1)]
    (found,) = common_settings.find(cases)
    assert str(found) == "fails in 3 of 10 cases: exactly those with rank >= 130"


def test_checks_are_apart_and_the_one_that_fails_most_comes_first() -> None:
    cases = [outcome(rank > 65, rank=rank) for rank in RANKS] + [outcome(True, check="calls", rank=3)]
    cases += [outcome(rank > 3, check="backward", rank=rank) for rank in RANKS] + [outcome(False, check="layouts")]
    assert [(one.check, one.failing) for one in common_settings.find(cases)] == [
        ("backward", 6), ("outputs", 4), ("calls", 1),
    ]  # fmt: skip


def test_the_settings_of_real_cases_include_those_with_default_values() -> None:
    def wrong(codes: Tensor, absmax2: Tensor, offset: Tensor, block: int) -> Tensor:
        decoded = double_quant.dequantize(codes, absmax2, offset, block)
        return decoded * 1.01 if block == 256 else decoded

    tried = suite_run.run(Implementation("acme", "operation", "double_dequantize", wrong))
    found = {one.check: one for one in common_settings.find(tried)}
    # `block=256` is the default, which the names of most cases leave out.
    assert found["outputs"].conditions == ("block=256",)
    assert found["outputs"].others == 0
