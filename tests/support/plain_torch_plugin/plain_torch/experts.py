"""LoRA on the stacked weights of a module of experts."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from plain_torch.adapted import AdapterLayer
from plain_torch.factors import Generator, lora_factors, trained
from plain_torch.layers import frozen, wide


def expert_updates(A: Tensor, B: Tensor, experts: int) -> Tensor:
    """Return B_k A_k of every expert, (K, outputs, inputs). A holds an expert's rows together, B a rank's columns."""
    left = B.reshape(len(B), -1, experts).permute(2, 0, 1)
    right = A.reshape(experts, -1, A.shape[1])
    return left @ right


class ExpertFactors(nn.Module):
    """A and B of one stacked weight."""

    def __init__(self, base: nn.Module, weight: Tensor, config: Any, generator: Generator, transposed: bool) -> None:
        super().__init__()
        self.transposed = transposed
        experts, outputs, inputs = (weight.transpose(1, 2) if transposed else weight).shape
        pairs = [
            lora_factors(getattr(config, "init", "kaiming"), config.rank, inputs, outputs, generator)
            for _ in range(experts)
        ]
        A, B = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        self.A = trained(A.reshape(-1, inputs), base, weight.dtype)
        self.B = trained(B.permute(1, 2, 0).reshape(outputs, -1), base, weight.dtype)

    def update(self, experts: int, dtype: torch.dtype) -> Tensor:
        """Return B_k A_k in the layout of the weight, computed in `dtype`."""
        product = expert_updates(self.A.to(dtype), self.B.to(dtype), experts)
        return product.transpose(1, 2) if self.transposed else product


class LoraExperts(AdapterLayer):
    """Module of experts whose own forward pass runs with W + s B A in the place of each stacked weight."""

    def __init__(self, base: nn.Module, config: Any, scaling: float, generator: Generator) -> None:
        if config.dropout or config.lora_bias:
            raise ValueError("stacked experts have neither a dropout nor a bias")
        super().__init__(base)
        self.scaling = scaling
        transposed = bool(getattr(base, "is_transposed", False))
        stacked = {name: weight for name, weight in base.named_parameters(recurse=False) if weight.dim() == 3}
        self.factors = nn.ModuleDict(
            {name: ExpertFactors(base, weight, config, generator, transposed) for name, weight in stacked.items()}
        )

    def trained(self) -> dict[str, nn.Parameter]:
        return dict(self.factors.named_parameters())

    def weight(self, name: str, dtype: torch.dtype) -> Tensor:
        """Return a frozen stacked weight in `dtype`."""
        return getattr(self.base, name).to(dtype)

    def updated(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Return the stacked weights with the updates of their experts, computed in `dtype` or that of the adapter."""
        weights = {}
        for name, factors in self.factors.items():
            weight = self.weight(name, dtype or factors.A.dtype)
            weights[name] = weight + self.scaling * factors.update(len(weight), weight.dtype)
        return weights

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return torch.func.functional_call(self.base, self.updated(), args, kwargs)

    def merged(self) -> nn.Module:
        layer = copy.deepcopy(self.base)
        dtype = next(iter(self.factors.values())).A.dtype
        for name, weight in self.updated(wide(dtype)).items():
            setattr(layer, name, frozen(weight.to(dtype)))
        return layer
