"""transformers' Conv1D is a linear layer with a transposed weight, for every Method that adapts it."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from reference.shared.layers import dense_weight
from support.two_layer_model import assert_same

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 3, "alpha": 8.0},
    "dora": {"rank": 3, "alpha": 8.0},
    "pissa": {"rank": 3, "alpha": 8.0},
    "vera": {"rank": 3},
    "adalora": {"rank": 3, "target_rank": 2, "alpha": 8.0, "total_steps": 10, "tinit": 1, "tfinal": 1},
}


def adapted(method: str, layer: nn.Module) -> Any:
    """Return the Adapted of a model with this one layer, whose trained tensors have random values."""
    module, model = import_module(f"reference.{method}"), nn.Sequential()
    model.add_module("layer", layer)
    config = module.Config(targets=("layer",), **CONFIGS[method])
    made = module.attach(model, config, torch.Generator().manual_seed(1))
    values = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for tensor in made.tensors().values():
            tensor += torch.randn(tensor.shape, generator=values, dtype=torch.float64) / 8
    return made


def twins(method: str, inputs: int, outputs: int) -> tuple[Any, Any]:
    """Return a Conv1D and a linear layer with the same matrix and bias, both adapted by the Method."""
    conv, linear = Conv1D(outputs, inputs).double(), nn.Linear(inputs, outputs).double()
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    return adapted(method, conv), adapted(method, linear)


def run(made: Any, x: Tensor) -> dict[str, Tensor]:
    """Return the output and the gradients of all trained tensors."""
    y = made.model(x)
    gradients = torch.autograd.grad(y.square().sum(), list(made.tensors().values()))
    return {"y": y.detach(), **dict(zip(made.tensors(), gradients, strict=True))}


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 8), (8, 12), (10, 10)])
@pytest.mark.parametrize("method", CONFIGS)
def test_it_computes_and_merges_as_the_linear_layer_with_the_transposed_weight(
    method: str, inputs: int, outputs: int
) -> None:
    conv, linear = twins(method, inputs, outputs)
    x = torch.randn(5, inputs, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    assert {n: t.shape for n, t in conv.tensors().items()} == {n: t.shape for n, t in linear.tensors().items()}
    assert_same(run(conv, x), run(linear, x))
    stored = conv.model.layer.base.weight.detach().clone()
    conv.merge()
    linear.merge()
    assert type(conv.model.layer) is Conv1D
    assert_same({"W": dense_weight(conv.model.layer)}, {"W": linear.model.layer.weight.data})
    conv.detach()
    assert torch.equal(conv.model.layer.weight, stored)
