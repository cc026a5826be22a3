"""VeRA (arXiv:2310.11454): h = W0 x + Lambda_b B Lambda_d A x, with random A and B that all layers share."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer
from plain_torch.factors import Generator, trained
from plain_torch.layers import layer_dtype, matrix, sizes, wide, with_matrix
from plain_torch.targets import select


def projections(rank: int, inputs: int, outputs: int, key: int) -> tuple[Tensor, Tensor]:
    """Draw the shared A (rank, inputs) and B (outputs, rank) in float32, with Kaiming's bound."""
    generator = torch.Generator().manual_seed(key)

    def drawn(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns, dtype=torch.float32).uniform_(-bound, bound, generator=generator)

    return drawn(rank, inputs), drawn(outputs, rank)


class VeraLinear(AdapterLayer):
    """Linear layer or Conv1D with trained vectors b (E,) and d (R,), and its part of the shared matrices."""

    def __init__(self, base: nn.Module, config: Any, A: Tensor, B: Tensor) -> None:
        super().__init__(base)
        outputs, inputs = sizes(base)
        dtype, self.dropout = layer_dtype(base), config.dropout
        self.b = trained(torch.zeros(outputs), base, dtype)
        self.d = trained(torch.full((config.rank,), config.d_initial, dtype=torch.float64), base, dtype)
        self.register_buffer("A", A.to(self.b)[:, :inputs], persistent=False)
        self.register_buffer("B", B.to(self.b)[:outputs], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        dropped = functional.dropout(x, self.dropout, self.training) if self.dropout else x
        return self.base(x) + self.b * functional.linear(self.d * functional.linear(dropped, self.A), self.B)

    def merged(self) -> nn.Module:
        dtype = wide(self.b.dtype)
        b, B, d, A = (tensor.to(dtype) for tensor in (self.b, self.B, self.d, self.A))
        return with_matrix(self.base, matrix(self.base) + b[:, None] * ((B * d) @ A), self.base.bias)


def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Wrap every target in a VeraLinear. The shared matrices are as large as the largest target, in each dimension."""
    bases = select(model, config.targets, ("linear", "Conv1D"))
    outputs, inputs = (max(side) for side in zip(*(sizes(base) for base in bases.values()), strict=True))
    A, B = projections(config.rank, inputs, outputs, config.projection_key)
    return Adapted(model, {path: VeraLinear(base, config, A, B) for path, base in bases.items()})
