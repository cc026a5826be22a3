"""The tolerance policies: what they let pass, what they refuse, and what they say about it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance.comparison.distances import Distance
from harness.conformance.comparison.moved_numbers import perturbed
from harness.conformance.comparison.tolerance_policies import (
    Judgement,
    carried_noise,
    exact,
    noise_floor,
    rounded_once,
    worst_of,
)
from harness.conformance.subject import DTYPES
from harness.conformance.tolerance_constants import (
    EPSILON,
    NOISE_FACTOR,
    NOISE_FLOOR_EPS,
    PERTURBED_DRAWS,
    ROUNDED_ULPS,
)


def judge(value: Tensor, truth: Tensor | None = None, dtype: str = "float32") -> Judgement:
    truth = torch.arange(1.0, 7.0).double().view(2, 3) if truth is None else truth
    return noise_floor({"y": value}, {"y": truth}, {"y": truth}, dtype)


RIGHT = torch.arange(1.0, 7.0).view(2, 3)


def test_the_right_values_pass() -> None:
    assert judge(RIGHT).passed
    assert judge(RIGHT).error == 0.0
    assert exact({"y": RIGHT}, {"y": RIGHT}).passed
    assert exact({"y": torch.tensor(-0.0)}, {"y": torch.tensor(0.0)}).passed


@pytest.mark.parametrize("policy", ["exact", "noise-floor"])
@pytest.mark.parametrize(
    ("have", "named"),
    [({}, "y"), ({"y": RIGHT, "z": RIGHT}, "z"), ({"z": RIGHT}, "y")],
    ids=["missing", "surplus", "renamed"],
)
def test_a_missing_or_surplus_tensor_fails(policy: str, have: dict[str, Tensor], named: str) -> None:
    want = {"y": RIGHT.double()}
    judged = exact(have, want) if policy == "exact" else noise_floor(have, want, want, "float32")
    assert not judged.passed
    how = "missing, though expected" if named == "y" else "present, though not expected"
    assert (judged.tensor, judged.worst) == (named, how)
    assert judged.ratio == float("inf")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_fails_and_is_counted(bad: float) -> None:
    value = RIGHT.clone()
    value[0, 1] = value[1, 2] = bad
    for judged in (judge(value), exact({"y": value}, {"y": RIGHT})):
        assert (judged.passed, judged.nonfinite, judged.error) == (False, 2, None)
        assert judged.worst.startswith("[0, 1]")
    everything = exact({"y": value, "z": value}, {"y": RIGHT, "z": RIGHT})
    assert everything.nonfinite == 4


def test_nan_equals_nan_and_nothing_else() -> None:
    both, one, none = torch.tensor([torch.nan, torch.nan]), torch.tensor([torch.nan, 1.0]), torch.tensor([0.0, 1.0])
    assert exact({"y": both}, {"y": both.clone()}).passed
    for have, want in ((both, one), (one, both), (one, none), (none, one)):
        assert not exact({"y": have}, {"y": want}).passed


@pytest.mark.parametrize("shape", [(3, 2), (6,), (1, 2, 3)])
def test_a_wrong_shape_fails_even_if_it_would_broadcast(shape: tuple[int, ...]) -> None:
    for judged in (judge(RIGHT.reshape(shape)), exact({"y": RIGHT.reshape(shape)}, {"y": RIGHT})):
        assert not judged.passed
        assert judged.worst == f"shape {shape}, should be (2, 3)"


def test_an_observation_of_nothing_fails() -> None:
    for judged in (exact({}, {}), noise_floor({}, {}, {}, "float32"), worst_of([], "exact")):
        assert (judged.passed, judged.worst) == (False, "nothing was observed")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_allowance_is_a_sharp_edge(dtype: str) -> None:
    truth = torch.ones(4, dtype=torch.float64) / 3
    rounded = {"y": truth.to(DTYPES[dtype])}
    allowed = noise_floor(rounded, {"y": truth}, rounded, dtype).allowed
    assert allowed > 0
    for share, passes in ((0.9, True), (1.1, False)):
        value = truth * (1 + share * allowed)
        judged = noise_floor({"y": value}, {"y": truth}, rounded, dtype)
        assert judged.passed == passes
        assert (judged.ratio < 1) == passes


def test_exact_means_every_bit() -> None:
    judged = exact({"y": torch.nextafter(RIGHT, RIGHT + 1)}, {"y": RIGHT})
    assert (judged.passed, judged.allowed) == (False, 0.0)
    assert judged.ratio == float("inf")


def test_the_worst_tensor_is_named_and_a_failure_outranks_a_close_call() -> None:
    close = Judgement(True, 0.99, 1.0, "close", "", "p", 0)
    wrong = Judgement(False, 2.0, 1.5, "wrong", "", "p", 3)
    assert worst_of([close, wrong], "p").tensor == "wrong"
    assert worst_of([close, wrong], "p").nonfinite == 3
    value = {"x": RIGHT, "y": RIGHT.clone().index_put_((torch.tensor(1), torch.tensor(0)), torch.tensor(9.0))}
    judged = exact(value, {"x": RIGHT, "y": RIGHT})
    assert (judged.tensor, judged.worst) == ("y", "[1, 0]: 9, should be 4")


def test_a_zero_truth_is_judged_by_absolute_error() -> None:
    zero = torch.zeros(3, dtype=torch.float64)
    assert judge(zero, zero).passed
    assert not judge(zero + 1e-3, zero).passed


def test_scalars_can_be_judged() -> None:
    assert "[]: 2, should be 1" in exact({"y": torch.tensor(2.0)}, {"y": torch.tensor(1.0)}).worst


@pytest.mark.parametrize("policy", [noise_floor, carried_noise])
def test_where_the_reference_itself_overflows_nobody_is_accused_and_the_rest_is_judged(policy: Any) -> None:
    truth = {"big": torch.tensor([70000.0]).double(), "small": torch.tensor([1.0, 2.0]).double()}
    rounded = {name: t.half() for name, t in truth.items()}
    assert policy(rounded, truth, rounded, "float16").passed
    wrong = rounded | {"small": torch.tensor([1.0, 3.0]).half()}
    judged = policy(wrong, truth, rounded, "float16")
    assert not judged.passed
    assert judged.tensor == "small"


def test_a_later_draw_of_noise_lets_no_failing_tensor_off() -> None:
    truth, near, far = torch.ones(4).double(), torch.ones(4) * 1.2, torch.ones(4) * 1.6
    judged = noise_floor({"y": torch.ones(4) * 3}, {"y": truth}, [{"y": near}, {"y": far}], "float32")
    assert judged.decided
    assert not judged.passed


def test_a_first_draw_that_by_luck_lost_next_to_nothing_accuses_nobody() -> None:
    truth = {"y": torch.linspace(1, 2, 64).double()}
    lucky, usual, worse = ({"y": truth["y"] * (1 + error)} for error in (1e-6, 5e-5, 1e-2))
    assert not carried_noise(usual, truth, lucky, "float32").passed
    assert carried_noise(usual, truth, [lucky, usual], "float32").passed
    assert not carried_noise(worse, truth, [lucky, usual, usual], "float32").passed


@pytest.mark.parametrize("policy", [noise_floor, carried_noise])
def test_no_more_noise_is_drawn_than_is_needed(policy: Any) -> None:
    def draws() -> Iterator[dict[str, torch.Tensor]]:
        yield {"y": RIGHT.float()}
        raise AssertionError("a second draw")

    assert policy({"y": RIGHT.float()}, {"y": RIGHT.double()}, draws(), "float32").passed


def test_equal_infinities_are_equal_and_a_tiny_truth_divides_nothing_by_zero() -> None:
    infinite = {"A": torch.tensor([1.0, torch.inf, -torch.inf])}
    assert exact(infinite, {"A": infinite["A"].clone()}).passed
    assert not exact(infinite, {"A": infinite["A"].abs()}).passed
    tiny = {"A": torch.full((3,), 1e-170, dtype=torch.float64)}
    assert noise_floor(tiny, tiny, tiny, "float64").passed
    assert not noise_floor({"A": 2 * tiny["A"]}, tiny, tiny, "float64").passed


def test_a_result_before_which_a_rounding_error_jumps_is_compared_with_all_plausible_results() -> None:
    jumped = RIGHT.double() * 1.01

    def draws() -> Iterator[dict[str, torch.Tensor]]:
        yield from [{"y": RIGHT.float()}] * (PERTURBED_DRAWS + 5)
        yield {"y": jumped.float()}

    for jumps in (False, True):
        verdict = noise_floor({"y": jumped.float()}, {"y": RIGHT.double()}, draws(), "float32", jumps=jumps)
        assert verdict.passed == jumps


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_a_moved_number_keeps_its_sign_and_what_has_no_neighbour_stays(dtype: str) -> None:
    limits = torch.finfo(getattr(torch, dtype))
    special = torch.tensor([0.0, math.inf, -math.inf, math.nan], dtype=getattr(torch, dtype)).repeat(20)
    moved = perturbed(special, dtype, torch.Generator().manual_seed(0), 2 * ROUNDED_ULPS)
    assert torch.equal(moved.nan_to_num(1.0), special.nan_to_num(1.0))
    smallest = torch.full((1000,), limits.smallest_normal * limits.eps, dtype=torch.float64)
    for sign in (1, -1):
        moved = perturbed(sign * smallest, dtype, torch.Generator().manual_seed(0), 4 * ROUNDED_ULPS)
        assert (sign * moved >= 0).all()
        assert (moved != sign * smallest).any()


def test_a_draw_that_overflows_allows_no_further_error() -> None:
    truth = torch.full((100,), 1.0, dtype=torch.float64)
    own = {"x": (truth * (1 + 2.0**-12)).half()}
    overflowed = {"x": torch.full((100,), math.inf, dtype=torch.float16)}
    judged = carried_noise({"x": (3 * truth).half()}, {"x": truth}, [own, own, overflowed], "float16", NOISE_FACTOR)
    assert not judged.passed
    assert judged.decided


@pytest.mark.parametrize(("dtype", "passes"), [("float32", True), ("bfloat16", False)])
def test_the_floor_grows_with_the_factor_where_each_term_of_a_sum_is_rounded(dtype: str, passes: bool) -> None:
    own = {"y": RIGHT.to(getattr(torch, dtype))}
    truth = {"y": own["y"].double()}  # the reference has no error, so only the floor allows one
    off = {"y": (truth["y"] * (1 + 4 * NOISE_FLOOR_EPS[dtype] * EPSILON[dtype])).to(getattr(torch, dtype))}
    assert not noise_floor(off, truth, own, dtype).passed
    assert noise_floor(off, truth, own, dtype, 8 * NOISE_FACTOR).passed is passes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_distance_of_a_large_tensor_counts_every_element(dtype: torch.dtype) -> None:
    """Large tensors are compared block by block. All numbers below are powers of two, so the results are exact."""
    truth = torch.zeros(1024, 1024, dtype=torch.float64)
    truth[0, 0] = 4.0
    first, last, lost = (truth.to(dtype, copy=True) for _ in range(3))
    first[0, 0], last[-1, -1], lost[-1, -1] = 5.0, 2.0, torch.nan
    assert Distance.of(first, truth) == Distance(norm=0.25, largest=256.0, share=0.25)
    assert Distance.of(last, truth) == Distance(norm=0.5, largest=512.0, share=0.0)
    assert Distance.of(last.T, truth.T) == Distance.of(last, truth)
    assert math.isnan(Distance.of(lost, truth).largest)
    assert math.isnan(Distance.of(lost, truth).norm)


def test_a_distance_far_outside_float64_is_infinite_and_no_error() -> None:
    truth = torch.ones(3, dtype=torch.float64)
    assert Distance.of(truth * 1e200, truth).norm == math.inf
    assert Distance.of(truth * 1e150, truth).norm < math.inf


def test_of_wrongly_rounded_elements_the_worst_is_named() -> None:
    truth = torch.tensor([-257.854889, 2**-9, 1.0], dtype=torch.float64)  # float16 has no number nearer than -257.75
    value = torch.tensor([-257.75, -(2**-9), 1.0], dtype=torch.float16)
    assert rounded_once({"W": value}, {"W": truth}).worst == "[1]: -0.001953125, should be 0.001953125"
