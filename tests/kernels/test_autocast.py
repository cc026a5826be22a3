"""Operations of `fused` under autocast: products in 16 bits, and gradients in the dtypes of the arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance import operations, parity_suite
from harness.conformance.comparison import operation_call
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.execution import suite_run
from harness.conformance.parity_suite import OperationCase
from harness.conformance.subject import DTYPES
from harness.kernels.torch.dora_linear import dora_linear
from harness.kernels.torch.lora_linear import lora_linear
from harness.kernels.torch.vera_linear import SharedProjection, vera_linear
from harness.methods.implementations.fused import operations as fused

LAYER = {"shape": [40, 24], "rows": [2, 7], "rank": 4}
THREE = {"shape": [40, 24], "rows": [2, 7], "ranks": [3, 2, 5]}
CASES: dict[str, list[dict[str, Any]]] = {
    "lora_linear": [LAYER, LAYER | {"dropout": 0.25}],
    "dora_linear": [LAYER, LAYER | {"dropout": 0.25, "bias": False}, LAYER | {"kind": "zero-rows"}],
    "vera_linear": [LAYER, LAYER | {"dropout": 0.25}],
    "lora_qkv": [THREE, THREE | {"dora": True}],
    "lora_mlp": [THREE, THREE | {"dora": True}],
    "lora_experts": [{"shape": [24, 20], "experts": 3, "rank": 3}],
    "multi_lora_linear": [{"ids": [1, 0, -1, 1], "ranks": [3, 16], "shape": [63, 48], "tokens": 3}],
    "nf4_linear": [{"shape": [40, 24], "rows": [2, 7]}],
    "nf4_lora_linear": [LAYER],
}
EVERY = [(name, values) for name, found in CASES.items() for values in found]


def test_every_operation_with_a_gradient_is_here() -> None:
    offered = {one.target for one in fused.implementations()}
    assert {name for name, one in operations.every().items() if one.differentiable and name in offered} == set(CASES)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("name", "values"), EVERY, ids=lambda one: one if isinstance(one, str) else "")
def test_outputs_and_gradients_are_as_right_as_the_references(name: str, values: dict[str, Any], dtype: str) -> None:
    mine = next(one for one in fused.implementations() if one.target == name)
    subject, case = suite_run.call(mine, parity_suite.load_operation(name), OperationCase(values, "float32"))

    def seen(function: Any, wide: torch.dtype, to: torch.dtype | None) -> dict[str, Tensor]:
        with torch.autocast("cpu", to, enabled=to is not None):
            outputs, leaves = operation_call.forward(subject, function, wide)
        gradients = operation_call.backward(outputs, leaves, case)
        if to is not None:
            assert {t.dtype for t in gradients.values()} == {torch.float32}
        return {name: y.detach() for name, y in outputs.items()} | gradients

    reference = subject.operation.reference
    truth, rounded = seen(reference, torch.float64, None), seen(reference, torch.float32, DTYPES[dtype])
    verdict = noise_floor(seen(subject.function, torch.float32, DTYPES[dtype]), truth, rounded, dtype)
    assert verdict.passed, verdict


def test_inputs_and_base_may_be_in_16_bits_already() -> None:
    """In the middle of a model, x has autocast's dtype. A base in 16 bits has adapters in float32."""
    x, W, bias = torch.randn(7, 24).bfloat16(), torch.randn(40, 24).bfloat16(), torch.randn(40).bfloat16()
    A, B, m = torch.randn(4, 24), torch.randn(40, 4), torch.randn(40)
    with torch.autocast("cpu", torch.bfloat16):
        assert lora_linear(x, W, bias, A, B, 0.5).dtype == torch.bfloat16
        assert dora_linear(x, W, bias, A, B, m, 0.5).dtype == torch.float32


def test_autocast_that_is_switched_off_again_casts_nothing() -> None:
    x, W, A, B = torch.randn(7, 24), torch.randn(40, 24), torch.randn(4, 24), torch.randn(40, 4)
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert lora_linear(x, W, None, A, B, 0.5).dtype == torch.float32


def test_the_shared_product_of_vera_is_that_of_the_present_projection() -> None:
    """Autocast copies A for each call, and a freed copy may leave its address to the next one."""
    x, W = torch.randn(7, 24).bfloat16(), torch.randn(40, 24).bfloat16()
    A, B, b, d = torch.randn(4, 24), torch.randn(40, 4), torch.randn(40), torch.ones(4, requires_grad=True)
    shared = SharedProjection()
    with torch.autocast("cpu", torch.bfloat16):
        first = vera_linear(x, W, None, A, B, b, d, shared=shared)
        A.mul_(0.5)
        second = vera_linear(x, W, None, A, B, b, d, shared=shared)
        assert torch.equal(second, vera_linear(x, W, None, A, B, b, d))
    assert not torch.equal(first, second)
