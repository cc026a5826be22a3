"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022, arXiv:2106.09685.

    h = W0 x + (alpha / r) B A x                                                      (paper, eq. 3 and section 4.1)

A (R, D) is drawn at random, B (E, R) is zero at the start, and W0 (E, D) is frozen. With `rslora`, the scaling is alpha
/ sqrt(r) (arXiv:2312.03732). With `lora_bias`, B has a bias c (E,), so that h = W0 x + (alpha / r) (B A x + c).
Embeddings and convolutions are in `shared/lora_layers.py`, stacked experts in `lora_experts.py`. Shape letters: T
tokens, D input features, E output features, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reference.lora_experts import LoraExperts, expert_factors
from reference.shared.adapted import AdaptedLayer, AdaptedLayers, LowRankLayer, adapt
from reference.shared.layers import CONVOLUTIONS, KINDS, device_of, features_in_out, floating_dtype, kind_of, targets
from reference.shared.lora_layers import LoraConv, LoraConv2dKernel, LoraEmbedding
from reference.shared.lora_start import embedding_factors, initial_factors
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2106.09685v2",
    factors=("A", "B"),
    opt_in_layers=("nn.Conv1d", "Conv3d"),
    deviations=(
        Deviation(
            topic="initialisation of A",
            paper="random Gaussian, no standard deviation given",
            here="uniform in +-1/sqrt(in), which has variance 1/(3 in)",
            why="the authors' code (loralib) and HF peft draw A like this; the paper states no sigma. init=gaussian "
            "uses HF peft's, 1/r for any `in`; init=orthogonal is in neither the paper nor loralib",
        ),
        Deviation(
            topic="dropout",
            paper="not in the main text",
            here="on the input of the adapter branch only; W0 x gets the whole input",
            why="loralib and HF peft do the same for linear layers; before convolutions HF peft drops too, and "
            "loralib does not",
        ),
        Deviation(
            topic="transformers' Conv1D",
            paper="W0 (out, in)",
            here="the weight is stored (in, out); A (r, in) and B (out, r) are as in a linear layer, and the update "
            "is transposed",
            why="loralib and HF peft do the same and call it fan_in_fan_out",
        ),
        Deviation(
            topic="embeddings",
            paper="not treated; A is random and B zero",
            here="A (r, num) is zero and B (dim, r) standard normal; no dropout",
            why="loralib and HF peft do the same: an id picks a column of A, so that each entry in the data gets its "
            "own gradient; `init` has no effect here, as in HF peft. HF peft accepts a dropout and ignores it, "
            "loralib has none",
        ),
        Deviation(
            topic="padding_idx",
            paper="not treated",
            here="the padding entry's column of A gets no gradient",
            why="loralib and HF peft do the same: the column starts at zero, so the padding entry does not change",
        ),
        Deviation(
            topic="convolutions",
            paper="not treated",
            here="conv=peft: A is the base's convolution to r channels, B is 1 x 1: r (in k k + out) numbers, rank "
            "r. conv=loralib: B A with A (r k, in k), B (out/groups k, r k), reshaped to the kernel: rank up to r k; in two "
            "dimensions only. A and B start as those of a linear layer of their sizes, so gaussian has 1/(r k)",
            why="the authors' code (loralib) and HF peft differ; peft's form is more widely used. loralib's factors have "
            "too many or too few numbers for the kernel of a Conv1d or Conv3d",
        ),
        Deviation(
            topic="convolutions with groups",
            paper="not treated",
            here="conv=peft: A sees all channels, B has the groups; merged, the layer has no groups",
            why="HF peft does the same but cannot merge it: the update connects channels of different groups",
        ),
        Deviation(
            topic="stacked experts",
            paper="not treated",
            here="every expert has an A and a B of its own, in the layout of HF peft's `target_parameters`; no dropout",
            why="HF peft does the same and has no dropout there either; the name `experts` in `targets` selects them, "
            "and `all-linear` does not, so that older results keep their meaning",
        ),
        Deviation(
            topic="bias of B",
            paper="not treated",
            here="lora_bias gives B a bias c of zeros, which trains and is scaled as B A is. Merged, scaling c is added "
            "to the bias of the layer; a layer without a bias gets this one. Embeddings and stacked experts refuse it",
            why="HF peft has the option and refuses the same layers. It cannot merge into a layer without a bias, and "
            "it adds c without the scaling to a layer of bitsandbytes in 4 or 8 bits (seen in 0.21.2)",
        ),
        Deviation(
            topic="merging",
            paper="W = W0 + B A is computed and stored when the model is deployed (section 4.1)",
            here="on request; the base layer stays unchanged, so that unmerging is exact",
            why="HF peft adds to the base weight and subtracts again. loralib does so at every change of mode, "
            "unless merge_weights is off, so that in eval mode its output does not depend on A and B any more",
        ),
        Deviation(
            topic="scaling",
            paper="alpha / r",
            here="alpha / r, or alpha / sqrt(r) with rslora",
            why="rsLoRA (arXiv:2312.03732) finds that alpha / r makes large ranks learn too slowly; HF peft offers "
            "both",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of LoRA."""

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 4096})
    """Rank r of the update B A."""
    alpha: float = field(default=16.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`; `experts` adapts stacked experts."""
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that an input feature of the adapter branch is dropped in training; embeddings have no dropout."""
    rslora: bool = False
    """True to scale by alpha / sqrt(rank) (arXiv:2312.03732)."""
    conv: str = field(default="peft", metadata={"choices": ("peft", "loralib")})
    """Shapes of A and B for a convolution: those of HF `peft` or of `loralib`."""
    init: str = field(
        default="kaiming", metadata={"choices": ("kaiming", "gaussian", "orthogonal"), "omit_default": True}
    )
    """Initial values: `kaiming` (uniform A) and `gaussian` (normal A) set B to 0; `orthogonal` draws A and B with B A = 0
    and mean square 1/200, and requires an even rank."""
    lora_bias: bool = field(default=False, metadata={"omit_default": True, "opt_in": True})
    """True to give B a trainable bias c with the same scaling as B A; for linear layers and convolutions only."""

    @property
    def scaling(self) -> float:
        """Factor on B A: alpha / r (section 4.1), or alpha / sqrt(r) with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class LoraLinear(LowRankLayer):
    """A frozen linear layer (..., D) -> (..., E) with a low-rank update from A (R, D) and B (E, R).

    `base` is an nn.Linear, a quantised subclass, or transformers' Conv1D. Merging adds `delta` to the weight, so that
    inference has no additional latency (section 4).
    """

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 x + scaling (B A x + c), shape (..., E)."""
        h_TR = self.dropout(x_TD) @ self.A.T
        y_TE: Tensor = self.base(x_TD) + self.scaling * (h_TR @ self.B.T)
        return self.with_bias(y_TE)


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model` and wrap every target in a LoRA layer. `generator` draws A and B, in the model's order of layers.

    Raises ValueError if a target names no layer, or a layer that LoRA cannot adapt with this config. The model is then
    unchanged.
    """
    return adapt(model, targets(model, config.targets, KINDS), lambda base: _adapted(base, config, generator))


def _adapted(base: Any, config: Config, generator: torch.Generator) -> AdaptedLayer:
    """Return a new LoRA layer around `base`, with its initial A and B."""
    like: dict[str, Any] = {"dtype": floating_dtype(base), "device": device_of(base)}
    kind = kind_of(base)
    R, s, p = config.rank, config.scaling, config.dropout

    def factors(rank: int, inputs: int, outputs: int) -> tuple[Tensor, Tensor]:
        A, B = initial_factors(config.init, rank, inputs, outputs, generator)
        return A.to(**like), B.to(**like)

    if config.lora_bias and kind in ("experts", "embedding"):
        raise ValueError("lora_bias adapts linear layers and convolutions only; leave it out, or choose other targets")

    def bias(outputs: int) -> Tensor | None:
        return torch.zeros(outputs, **like) if config.lora_bias else None

    if kind == "experts":
        return LoraExperts(base, expert_factors(base, R, config.init, p, generator), s)
    if kind == "embedding":
        return LoraEmbedding(base, *embedding_factors(base, R, generator), s)
    if kind in CONVOLUTIONS:
        E, C, G, K = base.out_channels, base.in_channels, base.groups, base.kernel_size
        if config.conv == "peft":
            if R % G:
                raise ValueError(f"rank {R} is no multiple of the convolution's {G} groups")
            if G > 1 and config.init == "orthogonal":
                raise ValueError(f"init=orthogonal cancels over the whole rank, and {G} groups see a part of it each")
            A, B = factors(R, math.prod((C, *K)), E)
            B = B[:, : R // G].contiguous().view(E, -1, *[1] * len(K))
            return LoraConv(base, A.view(R, C, *K), B, s, p, bias(E))
        if len(K) != 2 or K[0] != K[1]:
            raise ValueError(f"conv=loralib is defined for square kernels, and this one is {' x '.join(map(str, K))}")
        return LoraConv2dKernel(base, *factors(R * K[0], C * K[0], E // G * K[0]), s, p, bias(E))
    D, E = features_in_out(base)
    return LoraLinear(base, *factors(R, D, E), s, p, bias(E))
