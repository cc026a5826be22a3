"""Layers of a third party in the place of a model's layers."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, cast

import torch
from torch import nn

from harness.methods.wrap import wrap
from reference.lora import Config


class _Shifted(nn.Module):
    """A linear layer plus one trained number."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base, self.number = base, nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> Any:
        return nn.functional.linear(x, self.base.weight + self.number)


def test_merging_again_leaves_what_is_merged_as_it_is() -> None:
    model = nn.Sequential(OrderedDict(proj=nn.Linear(3, 2, bias=False)))
    adapted = wrap(model, Config(targets=("proj",)), _Shifted, None, lambda layer: layer.number.expand(2, 3))
    x, layer = torch.ones(1, 3), cast("_Shifted", adapted.layers["proj"])
    with torch.no_grad():
        before = model(x)
        adapted.merge()
        merged = model.proj
        layer.number.add_(1)
        adapted.merge()
        assert model.proj is merged
        assert torch.equal(model(x), before)
        adapted.unmerge()
        assert not torch.equal(model(x), before)
