"""Programs that are right, and that a check once failed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from harness.conformance import parity_suite
from harness.conformance.case_selection import FEW
from harness.conformance.execution import suite_run
from harness.methods.registry import Implementation, discover
from harness.records.record import Outcome
from reference import dora, galore, lora
from reference.shared.layers import dense_weight


def shape_of(tokens: int, inputs: int, outputs: int) -> parity_suite.CaseShape:
    return parity_suite.CaseShape.model_validate({"tokens": tokens, "in": inputs, "out": outputs})


def outcomes(
    mine: Implementation, check: str, config: dict[str, Any], dtype: str, *, weights: str = "normal", **shape: int
) -> set[Outcome]:
    of = shape_of(shape.get("tokens", 9), shape["inputs"], shape["outputs"])
    case = parity_suite.MethodCase(config, "linear", of, dtype, weights=weights)
    return {one.result.outcome for one in suite_run.run_case(mine, parity_suite.load(mine.target), case, only=[check])}


@pytest.mark.parametrize("name", ["reference", "fused"])
@pytest.mark.parametrize(("rank", "dtype"), [(48, "bfloat16"), (47, "float16"), (46, "float16")])
@pytest.mark.parametrize(("inputs", "outputs"), [(128, 48), (48, 130)])
def test_a_small_residual_may_be_rounded_as_the_product_in_float32_says(
    name: str, rank: int, dtype: str, inputs: int, outputs: int
) -> None:
    """At nearly full rank, PiSSA's residual is the difference of two numbers that are hundreds of times as large."""
    mine = discover().find("method", "pissa", name)
    config = {"rank": rank, "alpha": 16.0}
    assert outcomes(mine, "residual", config, dtype, inputs=inputs, outputs=outputs) == {Outcome.PASS}


def test_an_optimizer_may_step_other_parameters_before_it_refuses_a_gradient() -> None:
    def attach(model: nn.Module, config: galore.Config, generator: Any) -> Any:
        adapted: Any = galore.attach(model, config, generator)
        make = adapted.optimizer

        def other_groups_first(lr: float, weight_decay: float) -> Any:
            optimizer = make(lr, weight_decay)
            optimizer.param_groups.reverse()
            return optimizer

        adapted.optimizer = other_groups_first
        return adapted

    mine = Implementation("mine", "method", "galore", attach)
    assert outcomes(mine, "closure", {"rank": 3}, "float32", inputs=40, outputs=24) == {Outcome.PASS}


def gain_of(W: Tensor, A: Tensor, B: Tensor, m: Tensor, scaling: float) -> Tensor:
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        norm = torch.linalg.vector_norm(W.float() + scaling * (B.float() @ A.float()), dim=1).to(m.dtype)
    return m / norm


class GainLast(dora.DoraLinear):
    """DoRA as the paper writes it: one product with the gain g, and the bias after it."""

    def forward(self, x: Tensor) -> Tensor:
        W = dense_weight(self.base)
        y = linear(x, W) + self.scaling * linear(linear(x, self.A), self.B)
        y = gain_of(W, self.A, self.B, self.m, self.scaling) * y
        return y if self.base.bias is None else y + self.base.bias


def attach_gain_last(model: nn.Module, config: dora.Config, generator: torch.Generator) -> Any:
    adapted = dora.attach(model, config, generator)
    for layer in adapted.layers.values():
        layer.__class__ = GainLast
    return adapted


@pytest.mark.parametrize(("check", "tokens", "weights"), [("identity", 515, "large"), ("strides", 130, "normal")])
def test_a_16_bit_layer_may_multiply_by_the_gain_last(check: str, tokens: int, weights: str) -> None:
    mine = Implementation("mine", "method", "dora", attach_gain_last)
    config = {"rank": 71}
    found = outcomes(mine, check, config, "float16", weights=weights, tokens=tokens, inputs=1, outputs=40)
    assert found == {Outcome.PASS}


def dora_linear_gain_last(
    x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, m: Tensor, scaling: float, mask: Tensor | None
) -> Tensor:
    assert mask is None
    y = gain_of(W, A, B, m, scaling) * (linear(x, W) + scaling * linear(linear(x, A), B))
    return y if bias is None else y + bias


@pytest.mark.parametrize(
    ("values", "magnitude", "dtype"),
    [
        ({"shape": [24, 40], "rank": 3, "scaling": 100.0}, "huge", "float16"),
        ({"shape": [4, 1], "rank": 3, "kind": "large-rows"}, "outlier", "float32"),
    ],
)
def test_a_function_may_multiply_by_the_gain_last_where_this_overflows(
    values: dict[str, Any], magnitude: str, dtype: str
) -> None:
    plan = parity_suite.load_operation("dora_linear")
    typical = next(case for case in plan.cases(FEW, [dtype]) if case.typical)
    case = replace(typical, values={**typical.values, "rows": [17], "dropout": 0.0, **values}, magnitude=magnitude)
    mine = Implementation("mine", "operation", "dora_linear", dora_linear_gain_last, dtypes=(dtype,))
    found = suite_run.run_case(mine, plan, case, only=["outputs", "calls"])
    assert {one.check: one.result.outcome for one in found} == {"outputs": Outcome.PASS, "calls": Outcome.PASS}


def test_a_packed_weight_is_not_mistaken_for_the_update_of_its_adapter() -> None:
    """The error of NF4 is 20 times as large as an update with the scaling 1 / 288."""
    case = parity_suite.MethodCase(
        {"rank": 288, "alpha": 1.0}, "linear", shape_of(545, 17, 13), "float16", model="deep", weights="small"
    )
    mine = discover().find("method", "qlora", "reference")
    [found] = suite_run.run_case(mine, parity_suite.load("qlora"), case, wide=True, only=["shared_input"])
    assert found.result.outcome is Outcome.PASS, found.result.detail


def test_a_start_with_rows_of_random_sizes_may_be_larger_than_another_one() -> None:
    """LoRA's orthogonal start takes rows of a random matrix: with rank 2, the mean square of a start varies."""
    case = parity_suite.MethodCase(
        {"rank": 2, "init": "orthogonal"}, "linear", shape_of(2, 24, 40), "float32", model="deep"
    )
    right = discover().find("method", "lora", "reference")

    def attach_with_other_seed(model: nn.Module, config: Any, generator: torch.Generator) -> Any:
        return right(model, config, torch.Generator().manual_seed(generator.initial_seed() + 31))

    mine = Implementation("mine", "method", "lora", attach_with_other_seed)
    [found] = suite_run.run_case(mine, parity_suite.load("lora"), case, wide=True, only=["initial"])
    assert found.result.outcome is Outcome.PASS, found.result.detail


def test_a_layer_may_round_otherwise_beside_a_layer_in_another_dtype() -> None:
    """`fused` computes layers with one input together, and each alone if their dtypes differ."""

    def attach(model: nn.Module, config: lora.Config, generator: torch.Generator) -> Any:
        is_mixed = len({parameter.dtype for parameter in model.parameters()}) > 1
        adapted = lora.attach(model, config, generator)
        for layer in adapted.layers.values() if is_mixed else ():
            layer.register_forward_hook(lambda layer, given, y: y * (1 + torch.finfo(y.dtype).eps))
        return adapted

    case = parity_suite.MethodCase({"rank": 8, "alpha": 16}, "linear", shape_of(9, 24, 40), "float32", model="wide")
    mine = Implementation("mine", "method", "lora", attach)
    [found] = suite_run.run_case(mine, parity_suite.load("lora"), case, wide=True, only=["calls"])
    assert found.result.outcome is Outcome.PASS, found.result.detail


def test_a_start_that_hides_tiny_weights_is_no_failure_of_identity() -> None:
    """In LoRA's orthogonal start, B A is zero up to rounding, which may be more than the weight."""
    mine = discover().find("method", "lora", "reference")
    config = {"rank": 8, "alpha": 16, "init": "orthogonal"}
    assert outcomes(mine, "identity", config, "float32", weights="tiny", inputs=24, outputs=40) == {Outcome.SKIPPED}
    assert outcomes(mine, "identity", config, "float32", inputs=24, outputs=40) == {Outcome.PASS}
