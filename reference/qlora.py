"""QLoRA: Efficient Finetuning of Quantized LLMs. Dettmers et al., NeurIPS 2023, arXiv:2305.14314.

    Y = X doubleDequant(c1, c2, W_NF4) + s X L1 L2                                    (paper, eqs. 5 and 3)
    doubleDequant(c1, c2, W) = dequant(dequant(c1, c2), W)                            (eq. 6)

This is LoRA on a frozen weight that is stored in 4 bits and decoded for every product. L1 (D, R) is the transpose of
LoRA's A, and L2 (R, E) is the transpose of B. Shape letters: T tokens, D input features, E output features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from reference.lora_experts import QloraExperts, expert_factors
from reference.shared.adapted import AdaptedLayer, AdaptedLayers, LowRankLayer, adapt, add_bias
from reference.shared.layers import dense_copy, dense_weight, kind_of, targets
from reference.shared.lora_start import linear_factors
from reference.shared.nf4_weight import Nf4Weight
from reference.spec import Deviation, ReferenceSpec

KINDS = ("linear", "experts")
"""Kinds of layers that QLoRA adapts here."""

SPEC = ReferenceSpec(
    paper="arXiv:2305.14314v1",
    factors=("A", "B"),
    replaces_weight="codes",
    opt_in_layers=("experts",),
    deviations=(
        Deviation(
            topic="NF4, double quantisation",
            paper="eqs. 4 and 6, section 3",
            here="as in reference/operations/nf4.py and double_quant.py, which list their differences from the paper",
            why="bitsandbytes, the authors' quantiser, does the same",
        ),
        Deviation(
            topic="compute dtype",
            paper="bfloat16: eqs. 5 and 6 decode to it and multiply in it",
            here="the dtype of the input: level x absmax is formed in float32, then cast, then multiplied",
            why="this equals the paper's with bfloat16 inputs; the checks need float64 too. bitsandbytes decodes in "
            "the same order",
        ),
        Deviation(
            topic="scaling",
            paper="s in eq. 3, omitted in eq. 5",
            here="alpha / r",
            why="LoRA, the authors' code and HF peft do the same",
        ),
        Deviation(
            topic="dropout",
            paper="0.1 (7B, 13B) or 0.05, as LoRA's dropout, which is not defined there",
            here="on the input of the adapter branch only; the default is 0",
            why="the authors' code, which uses HF peft, does the same",
        ),
        Deviation(
            topic="adapted layers",
            paper="all linear layers of the transformer blocks",
            here="`targets`, by default the seven of a LLaMA block",
            why="the authors' code does not adapt or quantise the head either",
        ),
        Deviation(
            topic="unquantised parameters",
            paper="not stated",
            here="unchanged",
            why="the authors' script converts norms to float32; HF peft's prepare_model_for_kbit_training converts "
            "all 16-bit parameters, embeddings and head included",
        ),
        Deviation(
            topic="defaults",
            paper="NF4, double quantisation, products in bfloat16",
            here="as in the paper, with products in the dtype of the input",
            why="transformers' BitsAndBytesConfig defaults to FP4, no double quantisation and float32",
        ),
        Deviation(
            topic="merging",
            paper="not mentioned",
            here="into a dense layer of the decoded weight, in the dtype of the original one",
            why="HF peft quantises the sum again, which changes what the model computes",
        ),
        Deviation(
            topic="bias of B",
            paper="not treated",
            here="lora_bias gives B a trained bias c, as in LoRA; merged, scaling c is added to the bias of the layer",
            why="HF peft has the option. When it merges, it adds c without the scaling (seen in 0.21.2)",
        ),
        Deviation(
            topic="stacked experts",
            paper="not treated",
            here="each stacked parameter is quantised as a whole, in the order of its elements, so that a block may hold "
            "weights of two experts; the update is that of LoRA on experts",
            why="bitsandbytes' replace_parameter_4bit does the same; `all-linear` leaves experts out, as in LoRA",
        ),
        Deviation(
            topic="the original weight",
            paper="discarded after quantisation",
            here="stays as `base`, so that `detach` can restore it; no product reads it",
            why="a reference may use the memory that the method saves; double_quant.bits_per_parameter counts the bits",
        ),
        Deviation(
            topic="paged optimizers",
            paper="section 3: optimizer states in unified memory",
            here="not part of this file",
            why="they move states and change no value; the caller chooses the optimizer",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of QLoRA."""

    rank: int = field(default=64, metadata={"minimum": 1, "maximum": 4096})
    """Rank r of the update B A."""
    alpha: float = field(default=16.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Layers to quantise and adapt: ends of module paths, whole paths, `attention` or `all-linear`; also `experts`."""
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that an input feature of the adapter branch is dropped in training."""
    block: int = field(default=64, metadata={"choices": (32, 64, 128, 256, 512, 1024, 2048, 4096)})
    """Weights per block, which share one absmax."""
    double_quant: bool = True
    """True to quantise the absmax of the weight's blocks too, in blocks of 256 (see the Operation `double_quantize`).
    Otherwise absmax is float32, and there is no absmax2 and no offset."""
    lora_bias: bool = field(default=False, metadata={"omit_default": True, "opt_in": True})
    """True to give B a trainable bias c with the same scaling as B A."""


class QloraLinear(LowRankLayer):
    """A linear layer with a frozen 4-bit weight and a low-rank update from A (R, D) and B (E, R)."""

    base: nn.Linear
    """The original layer, an nn.Linear or a quantised subclass. Only its bias is used for the output."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, config: Config) -> None:
        c = B.new_zeros(len(B)) if config.lora_bias else None
        super().__init__(base, A, B, config.alpha / config.rank, config.dropout, c)
        self.packed = Nf4Weight(dense_weight(base).detach(), config.block, config.double_quant)

    def weight(self) -> Tensor:
        """Return the weight (E, D), decoded to float32."""
        return self.packed.decoded()

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return x W^T + bias + scaling (x A^T B^T + c), shape (..., E), in the dtype of x (eq. 5)."""
        h_TR = self.dropout(x_TD) @ self.A.T
        y_TE: Tensor = linear(x_TD, self.weight().to(x_TD.dtype), self.base.bias) + self.scaling * (h_TR @ self.B.T)
        return self.with_bias(y_TE)

    def packed_weights(self) -> dict[str, Nf4Weight]:
        """Map the name of each quantised parameter of `base` to its NF4 weight."""
        return {"weight": self.packed}

    def state(self) -> dict[str, Tensor]:
        """Return the tensors of the 4-bit weight by name: codes and absmax. Double quantisation adds absmax2 and offset."""
        return self.packed.tensors()

    def merged(self) -> nn.Linear:
        """Return a dense linear layer with the weight W + scaling B A, where W is the decoded weight.

        Its dtype is that of the original layer's weight.
        """
        dense = dense_copy(self.base)
        with torch.no_grad():
            dense.weight.copy_(self.weight().to(dense.weight.dtype) + self.delta().to(dense.weight.dtype))
        if self.c is not None:
            add_bias(dense, self.scaling * self.c)
        return dense


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model`, quantise every target, and add a low-rank update. A and B start as in LoRA.

    `generator` draws each A in turn. If the weight of a target is packed already, it is decoded and quantised again.
    Because of quantisation, the initial output differs from that of the base model. If the model is cast to another dtype
    later, the tensors of the 4-bit weight keep their dtypes and values. Raises ValueError if a target names no linear layer
    and no module of stacked experts, and for experts with a dropout or with lora_bias. The model is then unchanged.
    """
    return adapt(model, targets(model, config.targets, KINDS), lambda base: _adapted(base, config, generator))


def _adapted(base: Any, config: Config, generator: torch.Generator) -> AdaptedLayer:
    """Return a new QLoRA layer around `base`, with its initial A and B."""
    if kind_of(base) == "linear":
        return QloraLinear(base, *linear_factors(base, config.rank, generator), config)
    if config.lora_bias:
        raise ValueError("lora_bias adapts linear layers only; leave it out, or choose other targets")
    factors = expert_factors(base, config.rank, "kaiming", config.dropout, generator)
    return QloraExperts(base, factors, config.alpha / config.rank, config.block, config.double_quant)
