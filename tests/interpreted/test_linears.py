"""The layers with an adapter by Triton's kernels: outputs and every gradient, at sizes that no tile and no rank divides."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance import parity_suite
from harness.conformance.checks import every
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.execution import suite_run
from harness.conformance.parity_suite import OperationCase
from harness.kernels.triton.dora_linear import dora_linear
from harness.kernels.triton.lora_linear import lora_linear
from harness.kernels.triton.nf4_lora_linear import nf4_lora_linear
from harness.kernels.triton.support.dora_gain import dora_gain
from harness.kernels.triton.support.shrink import shrink
from harness.kernels.triton.support.token_sums import outer_sum, product_sum, weighted_outer_sum
from harness.kernels.triton.vera_linear import vera_linear
from harness.methods.registry import Implementation
from harness.records.record import Outcome

NUMBERS = ("outputs", "backward")
FLOATS = ("float32", "bfloat16", "float16")
SMALL = {"shape": [48, 65], "rows": [2, 5], "rank": 3, "dropout": 0.25}
SEVERAL_TILES = {"shape": [131, 140], "rows": [130], "rank": 17, "bias": False}
ONE = {"shape": [64, 33], "rows": [1], "rank": 1}
ABOVE_A_BLOCK = {"shape": [33, 48], "rows": [17], "rank": 70}

CASES: list[tuple[str, dict[str, Any], tuple[str, ...]]] = [
    ("lora_linear", SMALL, FLOATS),
    ("lora_linear", SEVERAL_TILES, ("bfloat16",)),
    ("lora_linear", ONE, ("float16",)),
    ("lora_linear", ABOVE_A_BLOCK | {"dropout": 0.5, "scaling": -0.3}, ("float32",)),
    ("nf4_lora_linear", SMALL, FLOATS),
    ("nf4_lora_linear", SEVERAL_TILES, ("float16",)),
    ("dora_linear", SMALL, FLOATS),
    ("dora_linear", SEVERAL_TILES, ("bfloat16",)),
    ("dora_linear", SEVERAL_TILES | {"dropout": 0.25}, ("float32",)),
    ("dora_linear", ABOVE_A_BLOCK, ("float16",)),
    ("dora_linear", {"shape": [63, 48], "rows": [17], "rank": 3, "kind": "zero-rows"}, ("bfloat16",)),
    ("dora_linear", {"shape": [63, 48], "rows": [17], "rank": 3, "kind": "cancelled"}, ("float32", "float16")),
    ("dora_linear", SMALL | {"kind": "cancelled"}, ("bfloat16",)),
    ("vera_linear", SMALL, FLOATS),
    ("vera_linear", SEVERAL_TILES | {"rank": 130}, ("bfloat16",)),
    ("vera_linear", ONE, ("float16",)),
]


def failures(operation: str, values: dict[str, Any], dtype: str, checks: tuple[str, ...]) -> list[str]:
    """Return what the conformance engine finds wrong with our kernels in one case."""
    function = getattr(importlib.import_module(f"harness.kernels.triton.{operation}"), operation)
    plan = parity_suite.load_operation(operation).model_copy(update={"checks": list(checks)})
    subject = Implementation("triton", "operation", operation, function)
    results = [one.result for one in suite_run.run_case(subject, plan, OperationCase(values, dtype))]
    assert len(results) == len(checks)
    return [str(result) for result in results if result.outcome is not Outcome.PASS]


@pytest.mark.parametrize(
    ("operation", "values", "dtype"),
    [(operation, values, dtype) for operation, values, dtypes in CASES for dtype in dtypes],
)
def test_outputs_and_gradients_are_those_of_the_reference(operation: str, values: dict[str, Any], dtype: str) -> None:
    assert failures(operation, values, dtype, NUMBERS) == []


@pytest.mark.parametrize("operation", ["lora_linear", "nf4_lora_linear", "dora_linear", "vera_linear"])
def test_any_layout_any_subset_of_gradients_and_the_same_bits_again(operation: str) -> None:
    others = tuple(
        check
        for check in parity_suite.load_operation(operation).checks
        if check not in NUMBERS and not (every()[check].only_wide or every()[check].calls_first)
    )
    assert failures(operation, SMALL, "bfloat16", others) == []


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Return integers of up to two digits, whose products and differences float32 holds."""
    return torch.randint(-60, 60, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [5, 70])
def test_dora_starts_as_its_layer_to_the_last_bit(dtype: torch.dtype, rank: int) -> None:
    W, x, bias = noise(40, 64, dtype=dtype), noise(9, 64, dtype=dtype, seed=1), noise(40, dtype=dtype, seed=2)
    A, B = noise(rank, 64, dtype=dtype, seed=3), torch.zeros(40, rank, dtype=dtype)
    _, m = dora_gain(W, A, B, torch.ones(40, dtype=dtype), 2.0)
    started = dora_linear(x, W, bias, A, B, m, 2.0, None)
    assert torch.equal(started, lora_linear(x, W, bias, A, B, 2.0, None))
    none_dropped = dora_linear(x, W, bias, A, B, m, 2.0, torch.ones_like(x))
    assert torch.equal(none_dropped, started)


def test_the_norm_of_a_cancelled_row_is_exact() -> None:
    A, B = whole(1, 64), whole(8, 1, seed=1)
    W = -2.0 * B @ A
    _, norm = dora_gain(W, A, B, torch.ones(8), 2.0)
    assert not norm.any()
    W[:, 0] += 4.0  # a sum of squares of which float32 holds no 16: it is below 2^-24 of most rows'
    gain, norm = dora_gain(W, A, B, torch.ones(8), 2.0)
    assert torch.equal(norm, torch.full((8,), 4.0))
    assert torch.equal(gain, torch.full((8,), 0.25))


def test_a_sum_over_many_tokens_has_several_parts() -> None:
    wide, narrow, mask = whole(3000, 3), whole(3000, 2, seed=1), whole(3000, 3, seed=2).sign()
    assert torch.equal(outer_sum(wide, narrow, mask=mask).double(), (wide * mask).double().T @ narrow.double())
    assert torch.equal(product_sum(wide, mask).double(), (wide * mask).double().sum(0))


def test_no_tokens_give_no_output_and_gradients_of_zero() -> None:
    for layer in (
        lambda x, A, B: lora_linear(x, noise(6, 8), None, A, B, 2.0, None),
        lambda x, A, B: dora_linear(x, noise(6, 8), None, A, B, noise(6), 2.0, torch.ones_like(x)),
    ):
        x, A, B = (noise(*shape).requires_grad_() for shape in ((2, 0, 8), (3, 8), (6, 3)))
        y = layer(x, A, B)
        y.sum().backward()
        assert y.shape == (2, 0, 6)
        assert not A.grad.any()
        assert not B.grad.any()
        assert x.grad.shape == x.shape


def test_rank_0_is_the_frozen_layer() -> None:
    x, A, B = noise(5, 8).requires_grad_(), noise(0, 8).requires_grad_(), noise(6, 0).requires_grad_()
    W = noise(6, 8, seed=1)
    y = lora_linear(x, W, None, A, B, 2.0, None)
    y.sum().backward()
    truth = {"y": x.detach().double() @ W.double().T}
    judged = noise_floor({"y": y.detach()}, truth, {"y": x.detach() @ W.T}, "float32")
    assert judged.passed, judged
    assert A.grad.shape == A.shape
    assert B.grad.shape == B.shape
    assert not weighted_outer_sum(noise(5, 6), noise(5, 0), B.detach()).any()
    assert product_sum(noise(5, 0), noise(5, 0)).shape == (0,)


def far_apart(rows: int, columns: int, *strides: int) -> Tensor:
    """Return bfloat16 whose last element is beyond int32, in memory of which the system gives only what is touched."""
    last = (rows - 1) * strides[0] + (columns - 1) * strides[1]
    assert last >= 2**31
    return torch.empty(last + 1, dtype=torch.bfloat16).as_strided((rows, columns), strides)


def test_elements_beyond_the_range_of_int32_are_read() -> None:
    W, A, B = (noise(*shape, dtype=torch.bfloat16, seed=s) for s, shape in enumerate(((3, 257), (2, 257), (3, 2))))
    x, m, mask = noise(4, 257, dtype=torch.bfloat16), torch.ones(3).bfloat16(), torch.ones(4, 257).bfloat16()
    rows_apart, columns_apart = far_apart(3, 257, 2**30, 1).copy_(W), far_apart(3, 257, 1, 2**23).copy_(W)
    assert torch.equal(lora_linear(x, rows_apart, None, A, B, 2.0, None), lora_linear(x, W, None, A, B, 2.0, None))
    assert torch.equal(
        dora_linear(x, rows_apart, None, A, B, m, 2.0, mask), dora_linear(x, W, None, A, B, m, 2.0, mask)
    )
    assert torch.equal(dora_gain(columns_apart, A, B, m, 2.0)[0], dora_gain(W, A, B, m, 2.0)[0])
    wide, narrow = noise(2, 3, dtype=torch.bfloat16), noise(2, 2, dtype=torch.bfloat16)
    apart = far_apart(2, 3, 1, 2**30).copy_(wide)
    assert torch.equal(outer_sum(apart, narrow), outer_sum(wide, narrow))
    assert torch.equal(product_sum(apart, wide), product_sum(wide, wide))


def test_invalid_shapes_and_dtypes_are_rejected() -> None:
    x, W, A, B, m = noise(2, 8), noise(6, 8), noise(3, 8), noise(6, 3), noise(6)
    with pytest.raises(ValueError, match=r"A must be \(3, 8\)"):
        lora_linear(x, W, None, noise(3, 7), B, 1.0, None)
    with pytest.raises(ValueError, match=r"B must be torch.float32 like x"):
        lora_linear(x, W, None, A, B.half(), 1.0, None)
    with pytest.raises(ValueError, match=r"mask must be \(2, 8\)"):
        dora_linear(x, W, None, A, B, m, 1.0, noise(1, 8))
    with pytest.raises(ValueError, match=r"d must be \(3,\)"):
        vera_linear(x, W, None, A, B, noise(6), noise(6), None)
    with pytest.raises(ValueError, match="weight requires a gradient"):
        dora_linear(x, W.requires_grad_(), None, A, B, m, 1.0, None)
    with pytest.raises(ValueError, match="needs 24 bytes"):
        nf4_lora_linear(x, torch.zeros(3, dtype=torch.uint8), noise(1), 64, (6, 8), None, A, B, 1.0, None)


def test_a_second_derivative_raises() -> None:
    x, A, B = noise(2, 8).requires_grad_(), noise(3, 8).requires_grad_(), noise(6, 3)
    (dx,) = torch.autograd.grad(lora_linear(x, noise(6, 8), None, A, B, 1.0, None).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_masked_feature_never_affects_the_update() -> None:
    x, mask = noise(3, 16), torch.zeros(3, 16)
    assert not shrink(x, noise(16, 2), mask=mask).any()
