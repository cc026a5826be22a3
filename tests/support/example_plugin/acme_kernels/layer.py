"""LoRA layer that does not depend on peft-harness. It applies the scaling where it adds the update to the base."""

import torch
from torch import nn


class AcmeLinear(nn.Module):
    def __init__(self, base, rank, scaling, generator):
        super().__init__()
        self.base, self.scaling = base, scaling
        out_features, in_features = base.weight.shape
        like = {"dtype": base.weight.dtype, "device": base.weight.device}
        drawn = torch.rand(rank, in_features, generator=generator, dtype=torch.float64)
        self.down = nn.Parameter(((2 * drawn - 1) * in_features**-0.5).to(**like))
        self.up = nn.Parameter(torch.zeros(out_features, rank, **like))

    def forward(self, x):
        low = nn.functional.linear(x, self.down)
        return torch.add(self.base(x), nn.functional.linear(low, self.up), alpha=self.scaling)

    def update(self):
        return self.scaling * self.up @ self.down
