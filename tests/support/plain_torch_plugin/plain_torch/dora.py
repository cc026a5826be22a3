"""DoRA (arXiv:2402.09353): W' = m (W0 + s B A) / ||W0 + s B A||, for linear layers, embeddings and convolutions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.factors import Generator, trained
from plain_torch.layers import convolve, kind_of, matrix, with_matrix, with_weight
from plain_torch.lora import KINDS, LoraConv, LoraEmbedding, LoraLinear, LowRank


def ratio(m: Tensor, norm: Tensor) -> Tensor:
    """Return m / norm, where 0 / 0 is 0 without a gradient."""
    zero = norm == 0
    return torch.where(zero, 0, m / torch.where(zero, 1, norm))


class Magnitudes(LowRank):
    """Layer with LoRA's factors and magnitudes m, which start as the norms of the base weight."""

    m: nn.Parameter

    def directions(self) -> Tensor:
        """Return V' = W0 + s B A, in at least float32."""
        raise NotImplementedError

    def norms(self, V: Tensor) -> Tensor:
        """Return the norms of V', in the shape of m."""
        raise NotImplementedError

    def start(self, config: Any) -> None:
        """Set m to the norms of the base weight."""
        self.detach_norm = config.detach_norm
        with torch.no_grad():
            self.m = trained(self.norms(self.directions()), self.base, self.A.dtype)

    def gains(self) -> Tensor:
        """Return g = m / ||V'||, in at least float32."""
        if self.detach_norm:
            with torch.no_grad():
                norm = self.norms(self.directions())
        else:
            norm = self.norms(self.directions())
        return ratio(self.m.to(norm.dtype), norm)


class DoraLinear(Magnitudes, LoraLinear):
    """Linear layer or Conv1D with a magnitude for every output, or for every input."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config, generator)
        self.per_input = config.per == "input"
        self.start(config)

    def directions(self) -> Tensor:
        A, B = self.widened()
        return matrix(self.base).to(A.dtype) + self.scaling * (B @ A)

    def norms(self, V: Tensor) -> Tensor:
        return torch.linalg.vector_norm(V, dim=0 if self.per_input else 1)

    def forward(self, x: Tensor) -> Tensor:
        dropped, W, g = self.dropped(x), matrix(self.base), self.gains()
        dtype = self.A.dtype
        if self.per_input:
            less, more = dropped * (g - 1).to(dtype), dropped * g.to(dtype)
            return (
                self.base(x)
                + functional.linear(less, W)
                + self.scaling * functional.linear(functional.linear(more, self.A), self.B)
            )
        low = self.scaling * functional.linear(functional.linear(dropped, self.A), self.B)
        return self.base(x) + (g - 1).to(dtype) * functional.linear(dropped, W) + g.to(dtype) * low

    def merged(self) -> nn.Module:
        g = self.gains()
        return with_matrix(self.base, self.directions() * (g if self.per_input else g[:, None]), self.merged_bias())


class DoraEmbedding(Magnitudes, LoraEmbedding):
    """Embedding (N, E) with a magnitude for every feature."""

    def __init__(self, base: nn.Embedding, config: Any, generator: Generator) -> None:
        if config.per == "input":
            raise ValueError("per=input is for linear layers")
        super().__init__(base, config, generator)
        self.start(config)

    def directions(self) -> Tensor:
        A, B = self.widened()
        return self.base.weight.T.to(A.dtype) + self.scaling * (B @ A)

    def norms(self, V: Tensor) -> Tensor:
        return torch.linalg.vector_norm(V, dim=1)

    def forward(self, ids: Tensor) -> Tensor:
        return self.gains().to(self.A.dtype) * (self.base(ids) + self.looked_up(ids))

    def merged(self) -> nn.Module:
        return with_weight(self.base, (self.gains()[:, None] * self.directions()).T)


class DoraConv(Magnitudes, LoraConv):
    """Convolution with a magnitude (1, E, 1, ...) for every output channel."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        if base.groups > 1 or config.per == "input":
            raise ValueError("DoRA adapts convolutions without groups, with a magnitude per output")
        super().__init__(base, config, generator)
        self.start(config)

    def directions(self) -> Tensor:
        delta = self.delta()
        return self.base.weight.to(delta.dtype) + self.scaling * delta

    def norms(self, V: Tensor) -> Tensor:
        return torch.linalg.vector_norm(V.flatten(1), dim=1).reshape(1, -1, *[1] * (V.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        dropped, g = self.dropped(x), self.gains()
        g = g if x.dim() == self.A.dim() else g[0]
        frozen = convolve(self.base, dropped, self.base.weight, None, groups=1)
        low = self.scaling * self.updated(dropped)
        return self.base(x) + (g - 1).to(self.A.dtype) * frozen + g.to(self.A.dtype) * low

    def merged(self) -> nn.Module:
        return with_weight(self.base, self.gains().transpose(0, 1) * self.directions())


def dora_layer(base: nn.Module, config: Any, generator: Generator) -> AdapterLayer:
    """Return the DoRA layer of a base layer of any kind."""
    kind = kind_of(base)
    if kind in ("linear", "Conv1D"):
        return DoraLinear(base, config, generator)
    return (DoraEmbedding if kind == "embedding" else DoraConv)(base, config, generator)


def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Wrap every target in a DoRA layer."""
    return Adapted(model, replace(model, config.targets, KINDS[:-1], lambda base: dora_layer(base, config, generator)))
