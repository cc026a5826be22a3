"""Methods of `fused` over our own NF4 layers, which no Operation stands for: what the reference has over the weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.conformance.subject import configure
from harness.conformance.tolerance import noise_floor
from harness.kernels.nf4_linear import Nf4Linear
from harness.registry import discover

D, E, T = 64, 48, 7


def attached(method: str, name: str, dtype: torch.dtype, dropout: float) -> Any:
    """Return one adapted layer with random factors; over packed weights for `fused`, over the decoded ones else."""
    torch.manual_seed(0)
    dense = nn.Linear(D, E)
    packed = Nf4Linear(dense, torch.float32)
    if name == "fused":
        model = nn.ModuleDict({"q_proj": packed})
    else:
        dense.weight.data = packed.packed_weight.decoded(torch.float32)
        model = nn.ModuleDict({"q_proj": dense}).to(dtype)
    config = configure(method, {"rank": 4, "alpha": 8.0, "targets": ["q_proj"], "dropout": dropout})
    adapted = discover([name]).find("method", method, name)(model, config, torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for tensor in adapted.tensors().values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / 4)
    return adapted


def seen(adapted: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    x = torch.randn(T, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(dtype).requires_grad_()
    layer = adapted.model["q_proj"]
    y = layer(x)
    (y * torch.linspace(-1, 1, E, dtype=dtype)).sum().backward()
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad} | {name: t.grad for name, t in adapted.tensors().items()}


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_layer_is_that_over_the_decoded_weight(method: str) -> None:
    mine = seen(attached(method, "fused", torch.float32, 0.0), torch.float32)
    truth, rounded = (seen(attached(method, "reference", dt, 0.0), dt) for dt in (torch.float64, torch.float32))
    assert noise_floor(mine, truth, rounded, "float32").passed


def test_dropout_of_nothing_leaves_everything() -> None:
    adapted = attached("dora", "fused", torch.float32, 0.5)
    adapted.model.eval()
    mine = seen(adapted, torch.float32)
    found = []
    for dtype in (torch.float64, torch.float32):
        reference = attached("dora", "reference", dtype, 0.5)
        reference.model.eval()
        found.append(seen(reference, dtype))
    assert noise_floor(mine, *found, "float32").passed
