"""DoRA: Weight-Decomposed Low-Rank Adaptation. Liu et al., ICML 2024, arXiv:2402.09353.

    W' = m (W0 + s B A) / ||W0 + s B A||                                                    (paper, eq. 5; s = alpha / r)

A frozen weight is split into direction and magnitude. LoRA moves the direction. The magnitude m starts at ||W0||. A (R,
D), B (E, R) and m (E,) train, and W0 (E, D) is frozen. Shape letters: T tokens, D input features, E output features, R
rank, N entries of an embedding table, C input channels, K sides of a kernel.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayer, AdaptedLayers, LowRankLayer
from reference.shared.layers import (
    CONVOLUTIONS,
    as_stored,
    dense_copy,
    dense_weight,
    features_in_out,
    kind_of,
    replace,
    targets,
)
from reference.shared.lora_layers import LoraConv, LoraEmbedding, convolve, pointwise
from reference.shared.lora_start import embedding_factors, initial_factors, linear_factors
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2402.09353v6",
    factors=("A", "B"),
    opt_in_layers=("nn.Conv1d", "Conv3d"),
    deviations=(
        Deviation(
            topic="axis of the norm",
            paper="per column of W (d, k), with B (d, r), A (r, k) and m (1, k); for h = W x this is one magnitude "
            "per input",
            here="one magnitude per output, the norm of a row of the stored (out, in) weight; per='input' selects "
            "the other reading",
            why="the authors' code and HF peft both compute norm(weight, dim=1); the authors' W is (in, out)",
        ),
        Deviation(
            topic="gradient through the norm",
            paper="section 4.3 treats the norm as a constant, to save memory; eq. 6 has the full gradient",
            here="constant, unless detach_norm is false",
            why="the authors' code does the same by default (dora_simple), and HF peft always. The full gradient reaches "
            "every entry of an embedding, even the one at padding_idx, because every entry is part of the norms",
        ),
        Deviation(
            topic="scaling",
            paper="W0 + B A, without alpha / r",
            here="W0 + (alpha / r) B A, also inside the norm",
            why="the authors' code and HF peft do the same; with the scaling outside, the rows of W' would not have "
            "the norm |m|",
        ),
        Deviation(
            topic="dropout",
            paper="not in the formulas",
            here="on the input of the added terms, (g - 1) W0 and g s B A with g = m / norm; W0 x gets the whole input",
            why="the authors' code and HF peft do the same; a dropped feature still passes through W0, unscaled by g",
        ),
        Deviation(
            topic="rows of zeros",
            paper="not treated: 0 / 0",
            here="0 / 0 is 0: the row of W' is zero, and neither m nor its row of B gets a gradient from it",
            why="published weights have such rows. They start with m = 0, where every direction gives a row of zeros "
            "and B gets no gradient. This choice is continuous, and the limit of a small number added to the norm "
            "(LyCORIS). The authors' code and HF peft return NaN",
        ),
        Deviation(
            topic="embeddings and convolutions",
            paper="not treated",
            here="A and B as in LoRA; one magnitude per output feature or output channel; convolutions without groups",
            why="HF peft does the same; a row of V' has the N entries of a feature, or the kernel of a channel. HF peft "
            "accepts groups, but reshapes B (E, R / groups) to (E / groups, R), so its norms are of another matrix",
        ),
        Deviation(
            topic="initialisation of A",
            paper="as in LoRA: Kaiming uniform",
            here="uniform in +-1/sqrt(in)",
            why="kaiming_uniform_(a=sqrt(5)) in the authors' code and HF peft is the same distribution",
        ),
    ),
)

KINDS = ("linear", "Conv1D", "embedding", *CONVOLUTIONS)
"""Kinds of layers that DoRA adapts."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters of DoRA."""

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 4096})
    """Rank r of the update B A."""
    alpha: float = field(default=16.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that an input feature is dropped in training; the base's output W0 x is computed without dropout."""
    detach_norm: bool = True
    """True to treat the norm as a constant in the backward pass (section 4.3)."""
    per: str = field(default="output", metadata={"choices": ("output", "input")})
    """Magnitude per `output` feature or, for linear layers and Conv1D, per `input` feature."""


def norms(V_ED: Tensor, per: str = "output") -> Tensor:
    """Return the Euclidean norms of a weight (E, D): of its rows (E,) for `output`, or of its columns (D,) for `input`.

    If all entries of a row or column are so small that their squares vanish, its norm is 0.
    """
    norm: Tensor = torch.linalg.vector_norm(V_ED, dim=1 if per == "output" else 0)
    return norm


def gain(m: Tensor, norm: Tensor) -> Tensor:
    """Return g = m / norm. Where the norm is 0, g is 0. Where m equals a norm other than 0, g is exactly 1."""
    some = norm > 0
    return torch.where(some, m, 0.0) / torch.where(some, norm, 1.0)


class DoraLayer(LowRankLayer):
    """A layer with LoRA's A and B and trainable magnitudes m. Subclasses compute V' = W0 + s B A and the norms of V'."""

    m: nn.Parameter
    detach_norm: bool

    def gain(self, norm: Tensor) -> Tensor:
        """Return g = m / norm. If `detach_norm` is true, the norm has no gradient (section 4.3: eq. 11, not eq. 6)."""
        return gain(self.m, norm.detach() if self.detach_norm else norm)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names A, B and m to the trainable parameters."""
        return {**super().tensors(), "m": self.m}


class DoraLinear(DoraLayer):
    """A linear layer (..., D) -> (..., E) with the weight m V' / ||V'||, where V' = W0 + s B A.

    A (R, D), B (E, R) and m train. m is (E,), or (D,) if each input feature has a magnitude. The base's bias is added
    unscaled. `base` is an nn.Linear, a quantised subclass, or transformers' Conv1D.
    """

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, config: Config) -> None:
        super().__init__(base, A, B, config.alpha / config.rank, config.dropout)
        self.detach_norm, self.per = config.detach_norm, config.per
        # This is ||W0||, since B = 0. It is computed in the same way as in `forward`, so that g is exactly 1 in any dtype.
        self.m = nn.Parameter(norms(self.direction(dense_weight(base)), self.per).detach())

    def direction(self, W0_ED: Tensor) -> Tensor:
        """Return V' = W0 + s B A (eq. 5), shape (E, D)."""
        return W0_ED + self.delta()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W' x + b, shape (..., E), as W0 x + b + (g - 1) W0 x + g s B A x with g = m / ||W0 + s B A||.

        As in the authors' code and HF peft, the base's output W0 x + b is computed first, and the other terms are
        added. Therefore the initial output equals the base's to the last bit, and dropout does not apply to W0 x + b.
        If each input feature has a magnitude, g multiplies the features of x.
        """
        W0_ED = dense_weight(self.base)
        norm = norms(self.direction(W0_ED), self.per)
        g = self.gain(norm)
        dropped_TD = self.dropout(x_TD)
        if self.per == "output":
            added_TE = (g - 1) * (dropped_TD @ W0_ED.T) + g * self.scaling * (dropped_TD @ self.A.T @ self.B.T)
        else:
            added_TE = ((g - 1) * dropped_TD) @ W0_ED.T + self.scaling * ((g * dropped_TD) @ self.A.T @ self.B.T)
        y_TE: Tensor = self.base(x_TD) + added_TE
        return y_TE

    def merged(self) -> Any:
        """Return a plain layer with the weight W' (eq. 5).

        The rows of W' have the norms |m|. If each input feature has a magnitude, the columns have these norms instead.
        """
        dense: Any = dense_copy(self.base)
        with torch.no_grad():
            V_ED = self.direction(dense_weight(dense))
            g = gain(self.m, norms(V_ED, self.per))
            dense.weight.copy_(as_stored(dense, g[:, None] * V_ED if self.per == "output" else V_ED * g))
        return dense


class DoraEmbedding(DoraLayer, LoraEmbedding):
    """An embedding table (N, E) with the weight m V' / ||V'||, where V' = W0 + s B A is the transposed table (E, N).

    A (R, N), B (E, R) and m (E,) train. As in LoRA, the update has no dropout, and column padding_idx of A gets
    no gradient from the looked-up entries. If `detach_norm` is false, this column gets a gradient through the norms.
    """

    def __init__(self, base: nn.Embedding, A: Tensor, B: Tensor, config: Config) -> None:
        super().__init__(base, A, B, config.alpha / config.rank)
        self.detach_norm = config.detach_norm
        self.m = nn.Parameter(norms(self.direction()).detach())

    def direction(self) -> Tensor:
        """Return V' = W0 + s B A, shape (E, N)."""
        return dense_weight(self.base) + self.delta()

    def forward(self, ids_T: Tensor) -> Tensor:
        """Return the entries `ids_T` of the table W', shape (..., E), as g (W0 + s B A)^T[ids] with g = m / ||V'||."""
        return self.gain(norms(self.direction())) * super().forward(ids_T)

    def merged(self) -> Any:
        """Return an embedding with the table W' (eq. 5). Its columns have the norms |m|."""
        dense: Any = dense_copy(self.base)
        with torch.no_grad():
            V_EN = self.direction()
            dense.weight.copy_(as_stored(dense, gain(self.m, norms(V_EN))[:, None] * V_EN))
        return dense


class DoraConv(DoraLayer, LoraConv):
    """A convolution with the kernel m V' / ||V'||, where V' = W0 + s B A is a kernel (E, C, *K).

    A (R, C, *K), B (E, R, 1, ...) and m (1, E, 1, ...) train. ||V'|| holds the norm of each output
    channel's kernel. Raises ValueError for a base with groups.
    """

    def __init__(self, base: Any, A: Tensor, B: Tensor, config: Config) -> None:
        super().__init__(base, A, B, config.alpha / config.rank, config.dropout)
        self.detach_norm = config.detach_norm
        self.m = nn.Parameter(self.norms(self.direction()).detach())

    def direction(self) -> Tensor:
        """Return V' = W0 + s B A, shape (E, C, *K)."""
        return self.base.weight + self.delta()

    @staticmethod
    def norms(V: Tensor) -> Tensor:
        """Return the norms of the kernels (C, *K) of all output channels, shape (1, E, 1, ...)."""
        return norms(V.flatten(1)).view(1, -1, *[1] * (V.dim() - 2))

    def forward(self, x: Tensor) -> Tensor:
        """Return W' * x + b, e.g. (..., E, H', W') for x (..., C, H, W). A star is a convolution.

        The output is computed as for a linear layer: W0 * x + b + (g - 1) W0 * d + g s B * (A * d), where d is x after
        dropout and g = m / ||V'||.
        """
        g = self.gain(self.norms(self.direction()))[0]  # x may have no dimension for a batch
        dropped = self.dropout(x)
        low = pointwise(convolve(self.base, dropped, self.A, groups=1), self.B)
        y: Tensor = self.base(x) + (g - 1) * convolve(self.base, dropped, self.base.weight, groups=1)
        return y + g * self.scaling * low

    def merged(self) -> Any:
        """Return a convolution with the kernel W' (eq. 5). Its output channels have the norms |m|."""
        dense: Any = dense_copy(self.base)
        with torch.no_grad():
            V = self.direction()
            dense.weight.copy_(gain(self.m, self.norms(V)).transpose(0, 1) * V)
        return dense


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model` and wrap every target in a DoRA layer. `generator` draws A and B, in the model's order of layers.

    Raises ValueError if a target names no layer, or a layer that DoRA cannot adapt with this config. The model is then
    unchanged.
    """
    layers: dict[str, AdaptedLayer] = {}
    for path, base in targets(model, config.targets, KINDS).items():
        if kind_of(base) in ("embedding", *CONVOLUTIONS) and config.per == "input":
            raise ValueError(f"{path}: per=input is defined for linear layers, not for {type(base).__name__}")
        if getattr(base, "groups", 1) != 1:
            raise ValueError(f"{path}: a convolution with {base.groups} groups has no DoRA")
        layers[path] = _adapted(base, config, generator)
    model.requires_grad_(False)
    for path, layer in layers.items():
        replace(model, path, layer)
    return AdaptedLayers(model, layers)


def _adapted(base: Any, config: Config, generator: torch.Generator) -> AdaptedLayer:
    """Return a new DoRA layer around `base`. A and B are drawn as in LoRA."""
    R = config.rank
    if kind_of(base) == "embedding":
        return DoraEmbedding(base, *embedding_factors(base, R, generator), config)
    if kind_of(base) in CONVOLUTIONS:
        W0 = base.weight
        A, B = initial_factors("kaiming", R, *features_in_out(base), generator)
        return DoraConv(base, A.to(W0).view(R, *W0.shape[1:]), B.to(W0).view(-1, R, *[1] * (W0.dim() - 2)), config)
    return DoraLinear(base, *linear_factors(base, R, generator), config)
