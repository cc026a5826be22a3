"""`fused` DoRA over weights in 4 bits, whoever packed them: what the reference computes, by other products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.cell import base_quantisation
from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.kernels.torch.support.shared_input import InputGroup
from harness.methods.implementations.fused.methods import dora
from harness.methods.registry import discover
from harness.records.record import Base
from reference.dora import Config, DoraLinear
from reference.shared.layers import dense_copy

D, E, R, T = 128, 192, 4, 24


class _Kept(nn.Module):
    """Dropout that is drawn already: the same for every side."""

    def __init__(self, p: float, scaled: Tensor) -> None:
        super().__init__()
        self.p, self.scaled = p, scaled

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scaled.to(x.dtype) if self.p else x


def observed(layer: Any, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x = x.clone().requires_grad_(True)
    y = layer(x)
    y.backward(dy.to(y.dtype))
    assert x.grad is not None
    return {"y": y.detach(), "x": x.grad, **{name: t.grad for name, t in layer.tensors().items()}}


@pytest.mark.parametrize("p", [0.0, 0.25])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by", ["bitsandbytes", "fused"])
def test_it_computes_what_the_reference_does(by: str, bias: bool, p: float, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    model: Any = nn.Sequential(nn.Linear(D, E, bias=bias))
    if bias:
        nn.init.constant_(model[0].bias, 100.0)  # in whose last digits (W0 x + b) - b would lose the product's
    base_quantisation.pack(model, ["0"], Base(quantization="nf4", implementation=by), torch.float32, discover())
    A, B = (torch.randn(shape, generator=generator) for shape in ((R, D), (E, R)))
    x, dy = torch.randn(T, D, generator=generator), torch.randn(T, E, generator=generator)
    mask = (torch.rand(T, D, generator=generator) >= p).float()
    monkeypatch.setattr(dora, "keep_mask", lambda *_: (mask, 1 - p))

    def made(base: nn.Module, dtype: torch.dtype) -> Any:
        layer = DoraLinear(base, A.to(dtype), B.to(dtype), Config(rank=R, dropout=p))
        with torch.no_grad():
            layer.m.mul_(1.5)
        layer.dropout = _Kept(p, mask / (1 - p))
        return layer.train()

    truth = observed(made(dense_copy(model[0]).double(), torch.float64), x.double(), dy.double())
    rounded = observed(made(dense_copy(model[0]), torch.float32), x, dy)
    subject = made(model[0], torch.float32)
    subject.__class__ = dora.FusedDoraLinear
    subject.input_group, subject.place = InputGroup(), 0
    subject.input_group.join(subject)
    judged = noise_floor(observed(subject, x, dy), truth, rounded, "float32")
    assert judged.passed, judged
