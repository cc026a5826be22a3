"""LLM.int8() under LoRA: 8-bit Matrix Multiplication at Scale. Dettmers et al., NeurIPS 2022, arXiv:2208.07339.

    h = int8product(x, W_int8) + (alpha / r) B A x          in eval mode; in training, x is not quantised

The weight has one int8 code per element and one absmax per row (`operations/int8.py`). In eval mode each row of the
input is quantised too, except in columns with outliers. Merging quantises W + (alpha / r) B A again, so that the merged
layer has 8 bits too. With `lora_bias`, B has a bias c, as in LoRA. Shape letters: T tokens, D input features, E output
features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayers, LowRankLayer, adapt
from reference.shared.int8_weight import Int8Linear, Int8Weight, add_bias
from reference.shared.layers import dense_weight, targets
from reference.shared.lora_start import linear_factors
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2208.07339v2, sections 2.1 and 3, with arXiv:2106.09685v2",
    factors=("A", "B"),
    replaces_weight="codes",
    merge_quantises=True,
    deviations=(
        Deviation(
            topic="vector-wise quantisation, outliers",
            paper="sections 2.1 and 3",
            here="as in reference/operations/int8.py, which lists its differences from the paper",
            why="bitsandbytes, the authors' library, does the same",
        ),
        Deviation(
            topic="training",
            paper="of LLM.int8() only in its appendix, of LoRA over it not treated",
            here="the product of the input with the decoded weight; the input is not quantised",
            why="bitsandbytes computes this on the CPU and on XPU. Its CUDA kernels quantise the input in training too",
        ),
        Deviation(
            topic="gradient of the input",
            paper="not treated",
            here="that of the product with the decoded weight, in eval mode too",
            why="bitsandbytes does the same: rounding has no useful gradient",
        ),
        Deviation(
            topic="merging",
            paper="not treated",
            here="W + (alpha / r) B A, where W is the decoded weight, is summed in at least float32 and quantised again, "
            "so that the output changes by the rounding of the codes; scaling c is added to the bias. In training mode the "
            "merged layer does not quantise its input either; it may be any module. Unmerging restores the codes",
            why="HF peft quantises the sum again too. It unmerges by subtracting and quantising once more, and adds c "
            "without the scaling",
        ),
        Deviation(
            topic="the original weight",
            paper="discarded after quantisation",
            here="stays as `base`, so that `detach` can restore it; no product reads it",
            why="a reference may use the memory that the method saves",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of LoRA over 8-bit weights."""

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 4096})
    """Rank r of the update B A."""
    alpha: float = field(default=16.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to quantise and adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that an input feature of the adapter branch is dropped in training."""
    threshold: float = field(default=6.0, metadata={"minimum": 0.0, "maximum": 1e4})
    """Magnitude from which a number of the input makes its column an outlier column in eval mode. 0: no outliers."""
    lora_bias: bool = False
    """True to give B a trainable bias c with the same scaling as B A."""


class LoraInt8Linear(LowRankLayer):
    """A linear layer with a frozen 8-bit weight and a low-rank update from A (R, D) and B (E, R)."""

    base: nn.Linear
    """The original layer, an nn.Linear or a quantised subclass. Only its bias is used for the output."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, config: Config) -> None:
        c = B.new_zeros(len(B)) if config.lora_bias else None
        super().__init__(base, A, B, config.alpha / config.rank, config.dropout, c)
        self.packed = Int8Weight(dense_weight(base).detach(), config.threshold)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return x W^T + bias + scaling (x A^T B^T + c), shape (..., E), in the dtype of x.

        In eval mode, the product x W^T is that of 8-bit codes (`operations/int8.py`).
        """
        h_TR = self.dropout(x_TD) @ self.A.T
        y_TE = add_bias(self.packed.product(x_TD, self.training), self.base.bias)
        return self.with_bias(y_TE + self.scaling * (h_TR @ self.B.T))

    def packed_weights(self) -> dict[str, Int8Weight]:
        """Map the name of each quantised parameter of `base` to its 8-bit weight."""
        return {"weight": self.packed}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the 8-bit weight by name: codes and absmax."""
        return self.packed.tensors()

    @torch.no_grad()
    def merged(self) -> Int8Linear:
        """Return a linear layer with the weight W + scaling B A in 8 bits, where W is the decoded weight.

        The sum is formed in float32 or, if the adapter is in float64, in float64.
        """
        delta = self.delta()
        wide = torch.promote_types(delta.dtype, torch.float32)
        packed = Int8Weight(self.packed.decoded(wide) + delta.to(wide), self.packed.threshold)
        bias: Tensor | None = self.base.bias
        if self.c is not None:
            c = self.scaling * self.c
            bias = c if bias is None else bias + c.to(bias.dtype)
        return Int8Linear(packed, bias).train(self.training)


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model`, quantise every target to 8 bits, and add a low-rank update. A and B start as in LoRA.

    `generator` draws each A in turn. Because of quantisation, the initial output differs from that of the base model.
    Raises ValueError if a target names no linear layer. The model is then unchanged.
    """

    def adapted(base: Any) -> LoraInt8Linear:
        return LoraInt8Linear(base, *linear_factors(base, config.rank, generator), config)

    return adapt(model, targets(model, config.targets), adapted)
