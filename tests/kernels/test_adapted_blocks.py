"""The torch kernels of blocks with several adapted layers: q, k and v; gate, up and down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from harness.conformance import operations
from harness.conformance.execution import suite_run
from harness.kernels.torch.lora_mlp import lora_mlp
from harness.methods.implementations import fused

SMALL = {"shape": [5, 4], "rows": [2], "ranks": [2, 1, 2]}


def drawn(name: str, **case: Any) -> dict[str, Any]:
    return operations.every()[name].arguments(torch.float64, torch.Generator().manual_seed(1), **{**SMALL, **case})


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lora_qkv", "lora_mlp"])
def test_fused_passes_its_checks(name: str) -> None:
    (one,) = (it for it in fused.implementations() if it.target == name)
    outcomes = suite_run.run(one, dtypes=("float32",))
    others = [outcome for outcome in outcomes if outcome.status.value != "pass"]
    assert len(others) < len(outcomes) / 10
    # Of inputs near the ends of the dtype, the products of two have no digits to compare.
    assert all("the reference itself is too inaccurate" in outcome.result.detail for outcome in others)


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu-tanh"])
def test_the_block_has_a_second_derivative(activation: str) -> None:
    given = drawn("lora_mlp", activation=activation)
    x = given.pop("x").requires_grad_(True)
    assert torch.autograd.gradgradcheck(lambda x: lora_mlp(x, **given), [x])


def test_a_backward_pass_saves_no_activation() -> None:
    given = drawn("lora_mlp", rows=[7])
    given["x"].requires_grad_(True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        lora_mlp(**given)
    # gate, up and the hidden state, which is the input of the down layer
    assert kept.count((7, 5)) == 3


def test_an_unknown_activation_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown activation 'relu'; there are silu, gelu and gelu-tanh"):
        lora_mlp(**drawn("lora_mlp") | {"activation": "relu"})
