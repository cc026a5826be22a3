"""LoRA (arXiv:2106.09685): h = W0 x + s (B A x + c), for linear layers, embeddings, convolutions and stacked experts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.experts import LoraExperts
from plain_torch.factors import Generator, lora_factors, trained
from plain_torch.layers import (
    convolve,
    kind_of,
    layer_dtype,
    matrix,
    per_channel,
    sizes,
    wide,
    with_matrix,
    with_weight,
)

KINDS = ("linear", "Conv1D", "embedding", "nn.Conv1d", "Conv2d", "Conv3d", "experts")


def scaling_of(config: Any) -> float:
    """Return alpha / r, or alpha / sqrt(r) for rsLoRA."""
    return config.alpha / (config.rank**0.5 if getattr(config, "rslora", False) else config.rank)


class LowRank(AdapterLayer):
    """Layer with LoRA's factors A and B, and perhaps a bias c of B."""

    def __init__(self, base: nn.Module, config: Any, factors: tuple[Tensor, Tensor], outputs: int) -> None:
        super().__init__(base)
        dtype = layer_dtype(base)
        self.scaling, self.dropout = scaling_of(config), getattr(config, "dropout", 0.0)
        self.A, self.B = (trained(factor, base, dtype) for factor in factors)
        self.c = trained(torch.zeros(outputs), base, dtype) if getattr(config, "lora_bias", False) else None

    def dropped(self, x: Tensor) -> Tensor:
        """Return the input of the adapter branch."""
        return functional.dropout(x, self.dropout, self.training) if self.dropout else x

    def widened(self) -> tuple[Tensor, Tensor]:
        """Return A and B in at least float32."""
        return self.A.to(wide(self.A.dtype)), self.B.to(wide(self.B.dtype))

    def merged_bias(self) -> Tensor | None:
        """Return the bias of the merged layer."""
        bias = getattr(self.base, "bias", None)
        if self.c is None:
            return bias
        added = self.scaling * self.c.to(wide(self.c.dtype))
        return (added if bias is None else bias + added).to(self.c.dtype)


class LoraLinear(LowRank):
    """Linear layer (..., D) -> (..., E), or transformers' Conv1D, with A (R, D) and B (E, R)."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        outputs, inputs = sizes(base)
        init = getattr(config, "init", "kaiming")
        super().__init__(base, config, lora_factors(init, config.rank, inputs, outputs, generator), outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scaling * functional.linear(
            functional.linear(self.dropped(x), self.A), self.B, self.c
        )

    def merged(self) -> nn.Module:
        A, B = self.widened()
        return with_matrix(self.base, matrix(self.base) + self.scaling * (B @ A), self.merged_bias())


class LoraEmbedding(LowRank):
    """Embedding (N, E) with A (R, N), zero at the start, and a random B (E, R). It has no dropout."""

    def __init__(self, base: nn.Embedding, config: Any, generator: Generator) -> None:
        if base.max_norm is not None:
            raise ValueError("an embedding with max_norm rewrites its table")
        if getattr(config, "lora_bias", False):
            raise ValueError("an embedding has no bias")
        rank = config.rank
        A = torch.zeros(rank, base.num_embeddings, dtype=torch.float64)
        B = torch.randn(base.embedding_dim, rank, generator=generator, dtype=torch.float64)
        super().__init__(base, config, (A, B), base.embedding_dim)

    def looked_up(self, ids: Tensor) -> Tensor:
        """Return the update of the entries, with the factor that the base multiplies its entries by."""
        columns = functional.embedding(
            ids, self.A.T, self.base.padding_idx, scale_grad_by_freq=self.base.scale_grad_by_freq
        )
        return self.scaling * functional.linear(columns, self.B) * embed_scale(self.base, self.B)

    def forward(self, ids: Tensor) -> Tensor:
        return self.base(ids) + self.looked_up(ids)

    def merged(self) -> nn.Module:
        A, B = self.widened()
        return with_weight(self.base, self.base.weight + self.scaling * (B @ A).T)


def embed_scale(base: nn.Module, like: Tensor) -> Tensor | float:
    """Return the factor that an embedding multiplies its entries by."""
    scale = getattr(base, "embed_scale", 1.0)
    return scale.to(like.dtype) if isinstance(scale, Tensor) else scale


class LoraConv(LowRank):
    """Convolution with an update in two parts: a convolution A (R, C, *K), then B (E, R/G, 1, ...) with the groups."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        outputs, rank, groups = base.out_channels, config.rank, base.groups
        if rank % groups:
            raise ValueError(f"{groups} groups do not divide the rank {rank}")
        channels, sides = base.in_channels, base.kernel_size
        inputs = channels * torch.Size(sides).numel()
        pairs = [
            lora_factors(getattr(config, "init", "kaiming"), rank // groups, inputs, outputs // groups, generator)
            for _ in range(groups)
        ]
        A, B = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        if getattr(config, "init", "kaiming") == "gaussian":
            A = A / groups
        factors = A.reshape(rank, channels, *sides), B.reshape(outputs, rank // groups, *[1] * len(sides))
        super().__init__(base, config, factors, outputs)

    def updated(self, x: Tensor) -> Tensor:
        """Return B A x, without scaling and bias."""
        low = convolve(self.base, x, self.A, None, groups=1)
        return getattr(functional, f"conv{self.A.dim() - 2}d")(low, self.B, groups=self.base.groups)

    def forward(self, x: Tensor) -> Tensor:
        added = self.updated(self.dropped(x))
        if self.c is not None:
            added = added + per_channel(self.c, self.base.weight)
        return self.base(x) + self.scaling * added

    def delta(self) -> Tensor:
        """Return B A as a kernel (E, C, *K) of a convolution without groups, in at least float32."""
        A, B = self.widened()
        groups = self.base.groups
        product = B.reshape(groups, -1, B.shape[1]) @ A.reshape(groups, B.shape[1], -1)
        return product.reshape(len(B), *A.shape[1:])

    def merged(self) -> nn.Module:
        layer = with_weight(self.base, without_groups(self.base) + self.scaling * self.delta(), self.merged_bias())
        layer.groups = 1
        return layer


def without_groups(base: nn.Module) -> Tensor:
    """Return the kernel (E, C, *K) of the same convolution without groups."""
    weight = base.weight
    whole = weight.new_zeros(len(weight), base.in_channels, *weight.shape[2:])
    outputs, inputs = len(weight) // base.groups, weight.shape[1]
    for group in range(base.groups):
        rows = slice(group * outputs, (group + 1) * outputs)
        whole[rows, group * inputs : (group + 1) * inputs] = weight[rows]
    return whole


class LoraConvKernel(LowRank):
    """Convolution with a square kernel (E, C/G, K, K), to which loralib adds B A; A is (R K, C K), B is (E/G K, R K)."""

    def __init__(self, base: nn.Conv2d, config: Any, generator: Generator) -> None:
        if kind_of(base) != "Conv2d" or len(set(base.kernel_size)) > 1:
            raise ValueError("conv=loralib requires a square kernel of two dimensions")
        side = base.kernel_size[0]
        rows = base.out_channels // base.groups * side
        factors = lora_factors(config.init, config.rank * side, base.in_channels * side, rows, generator)
        super().__init__(base, config, factors, base.out_channels)

    def forward(self, x: Tensor) -> Tensor:
        kernel = (self.B @ self.A).reshape(self.base.weight.shape)
        return self.base(x) + self.scaling * convolve(self.base, self.dropped(x), kernel, self.c, self.base.groups)

    def merged(self) -> nn.Module:
        A, B = self.widened()
        delta = (B @ A).reshape(self.base.weight.shape)
        return with_weight(self.base, self.base.weight + self.scaling * delta, self.merged_bias())


def lora_layer(base: nn.Module, config: Any, generator: Generator) -> AdapterLayer:
    """Return the LoRA layer of a base layer of any kind."""
    kind = kind_of(base)
    if kind == "experts":
        return LoraExperts(base, config, scaling_of(config), generator)
    if kind == "embedding":
        return LoraEmbedding(base, config, generator)
    if kind in ("linear", "Conv1D"):
        return LoraLinear(base, config, generator)
    return (LoraConvKernel if config.conv == "loralib" else LoraConv)(base, config, generator)


def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Wrap every target in a LoRA layer."""
    return Adapted(model, replace(model, config.targets, KINDS, lambda base: lora_layer(base, config, generator)))
