"""LoHa and LoKr (arXiv:2309.14859): updates that are formed as a matrix, with a dropout of its rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.factors import Generator, by_columns, trained
from plain_torch.layers import layer_dtype, matrix, sizes, wide, with_matrix


class MatrixUpdate(AdapterLayer):
    """Linear layer with the update alpha / r times a matrix (E, D)."""

    def __init__(self, base: nn.Module, config: Any) -> None:
        super().__init__(base)
        self.scaling, self.rank_dropout = config.alpha / config.rank, config.rank_dropout

    def delta(self, dtype: torch.dtype) -> Tensor:
        """Return the update without scaling, computed in `dtype`."""
        raise NotImplementedError

    def add(self, name: str, values: Tensor) -> None:
        """Add a trained tensor."""
        self.register_parameter(name, trained(values, self.base, layer_dtype(self.base)))

    def forward(self, x: Tensor) -> Tensor:
        update = self.scaling * self.delta(layer_dtype(self.base))
        if self.training and self.rank_dropout:
            keeps = (torch.rand(len(update), device=update.device, dtype=torch.float32) >= self.rank_dropout).float()
            update = update * (keeps / keeps.mean().clamp(min=1 / len(keeps))).to(update.dtype)[:, None]
        return self.base(x) + functional.linear(x, update)

    def merged(self) -> nn.Module:
        delta = self.delta(wide(layer_dtype(self.base)))
        return with_matrix(self.base, matrix(self.base) + self.scaling * delta, self.base.bias)


class LohaLinear(MatrixUpdate):
    """Linear layer with the update (B1 A1) * (B2 A2), element by element."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config)
        (outputs, inputs), rank = sizes(base), config.rank
        self.add("A1", by_columns(rank, inputs, generator))
        self.add("B1", by_columns(outputs, rank, generator))
        self.add("A2", torch.zeros(rank, inputs))
        self.add("B2", by_columns(outputs, rank, generator))

    def delta(self, dtype: torch.dtype) -> Tensor:
        return (self.B1.to(dtype) @ self.A1.to(dtype)) * (self.B2.to(dtype) @ self.A2.to(dtype))


def largest_divisor(size: int, limit: int) -> int:
    """Return the largest divisor of `size` that is at most `limit`."""
    return next(divisor for divisor in range(min(size, limit), 0, -1) if size % divisor == 0)


def left_side(size: int, factor: int) -> int:
    """Return the largest divisor of `size` that is at most sqrt(size), and at most a positive `factor` (eq. 5)."""
    root = int(size**0.5)
    return largest_divisor(size, min(root, factor) if factor > 0 else root)


class LokrLinear(MatrixUpdate):
    """Linear layer with the update C kron (B A), or C kron W2 if the rank is at least half of its larger side."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config)
        outputs, inputs = sizes(base)
        rows, columns, rank = left_side(outputs, config.factor), left_side(inputs, config.factor), config.rank
        right = outputs // rows, inputs // columns
        peft = config.init == "peft"
        self.add("C", torch.zeros(rows, columns) if peft else by_columns(rows, columns, generator))
        self.full = 2 * rank >= max(right)
        if self.full:
            self.add("W2", by_columns(*right, generator) if peft else torch.zeros(right))
        else:
            self.add("B", by_columns(right[0], rank, generator))
            self.add("A", by_columns(rank, right[1], generator) if peft else torch.zeros(rank, right[1]))

    def delta(self, dtype: torch.dtype) -> Tensor:
        right = self.W2.to(dtype) if self.full else self.B.to(dtype) @ self.A.to(dtype)
        # torch.kron raises for some factors that are transposed in memory.
        product = self.C.to(dtype)[:, None, :, None] * right[None, :, None, :]
        return product.reshape(len(self.C) * len(right), -1)


def attacher(
    make: Callable[[nn.Module, Any, Generator], AdapterLayer],
) -> Callable[[nn.Module, Any, Generator], Adapted]:
    """Return `attach` for a kind of layer."""

    def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
        return Adapted(model, replace(model, config.targets, ("linear",), lambda base: make(base, config, generator)))

    return attach


attach_loha, attach_lokr = attacher(LohaLinear), attacher(LokrLinear)
