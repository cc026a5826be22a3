"""Layers that the fused package refuses stay as they were."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import nn

from harness.conformance.subject import configure
from harness.errors import Unsupported


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("layer", [nn.Embedding(9, 6), nn.Conv2d(4, 6, 3)], ids=lambda layer: type(layer).__name__)
def test_a_model_with_a_refused_target_stays_trainable(method: str, layer: nn.Module) -> None:
    attach = importlib.import_module(f"harness.methods.implementations.fused.methods.{method}").attach
    model = nn.Sequential(layer, nn.Linear(6, 4))
    config = configure(method, {"targets": ["0", "1"]})
    with pytest.raises(Unsupported, match=rf"^0 is a {type(layer).__name__}; .* linear layers"):
        attach(model, config, torch.Generator())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model[0], type(model[1])) == (layer, nn.Linear)
