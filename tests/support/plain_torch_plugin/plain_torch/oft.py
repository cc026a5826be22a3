"""OFT (arXiv:2306.07280, 2506.19847): h = W0 R^T x, where R is orthogonal in blocks."""

from typing import Any

import torch
from torch import Tensor, nn

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.factors import Generator, trained
from plain_torch.layers import layer_dtype, matrix, sizes, wide, with_matrix
from plain_torch.weight_updates import largest_divisor


class OftLinear(AdapterLayer):
    """Linear layer whose input is rotated block by block. Q (N, K (K - 1) / 2) trains."""

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__(base)
        inputs = sizes(base)[1]
        self.side = largest_divisor(inputs, config.block_size)
        if self.side < 2:
            raise ValueError(f"no block of at most {config.block_size} divides {inputs} inputs")
        self.powers = None if config.cayley == "exact" else config.terms - 2
        count = self.side * (self.side - 1) // 2
        self.Q = trained(torch.zeros(inputs // self.side, count), base, layer_dtype(base))

    def rotations(self) -> Tensor:
        """Return R_i (N, K, K), in at least float32."""
        numbers = self.Q.to(wide(self.Q.dtype))
        rows, columns = torch.triu_indices(self.side, self.side, offset=1, device=numbers.device)
        above = numbers.new_zeros(len(numbers), self.side, self.side)
        above = above.index_put((torch.arange(len(numbers), device=numbers.device)[:, None], rows, columns), numbers)
        Q = above - above.transpose(1, 2)
        unit = torch.eye(self.side, dtype=Q.dtype, device=Q.device)
        if self.powers is None:
            return torch.linalg.solve(unit - Q, unit + Q, left=False)
        series = unit.expand_as(Q)
        for _ in range(self.powers):
            series = unit + Q @ series
        return (unit + Q) @ series

    def blocks(self, x: Tensor) -> Tensor:
        """View the last dimension of a tensor as (N, 1, K)."""
        return x.reshape(*x.shape[:-1], -1 if x.numel() else self.Q.shape[0], 1, self.side)

    def forward(self, x: Tensor) -> Tensor:
        return self.base((self.blocks(x) @ self.rotations().to(self.Q.dtype)).reshape(x.shape))

    def merged(self) -> nn.Module:
        R = self.rotations()
        weight = matrix(self.base).to(R.dtype)
        turned = (self.blocks(weight) @ R.transpose(1, 2)).reshape(weight.shape)
        return with_matrix(self.base, turned, self.base.bias)


def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Wrap every target in an OftLinear. Nothing is drawn."""
    return Adapted(model, replace(model, config.targets, ("linear",), lambda base: OftLinear(base, config)))
