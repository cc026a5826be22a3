"""LoRA: Low-Rank Adaptation of Large Language Models. Hu et al., ICLR 2022, arXiv:2106.09685.

    h = W0 x + (alpha / r) B A x                                                      (paper, eq. 3 and section 4.1)

A (r, in) is drawn at random, B (out, r) is zero, W0 (out, in) is frozen. Shape letters: T tokens, D in, E out, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.adapted import Adapted
from reference.layers import dense_copy, floating_dtype, replace, targets

PAPER = "arXiv:2106.09685v2"
DEVIATIONS = (
    (
        "initialisation of A",
        "random Gaussian, no standard deviation given",
        "uniform in +-1/sqrt(in), which has variance 1/(3 in)",
        "the authors' code (loralib) and HF peft both draw A so; the paper's sigma is not stated anywhere",
    ),
    (
        "dropout",
        "not in the main text",
        "on the input of the adapter branch only; W0 x sees the whole input",
        "as in loralib and HF peft",
    ),
)


@dataclass(frozen=True)
class Config:
    """LoRA's knobs.

    rank: r. alpha: the numerator of the scaling alpha / r. targets: last parts of the module paths to adapt, or whole
    paths. dropout: probability that an input feature of the adapter branch is dropped in training.
    """

    rank: int = field(default=8, metadata={"least": 1, "most": 4096})
    alpha: float = field(default=16.0, metadata={"least": 1e-3, "most": 1e4})
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    dropout: float = field(default=0.0, metadata={"least": 0.0, "most": 0.99})


class LoraLinear(nn.Module):
    """A frozen linear layer with a low-rank update.

    base: an nn.Linear or a quantised subclass of it, maps (..., D) to (..., E). A (R, D), B (E, R).
    """

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.base = base
        self.A, self.B = nn.Parameter(A), nn.Parameter(B)
        self.scaling, self.dropout = scaling, nn.Dropout(dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 x + scaling B A x, shape (..., E)."""
        h_TR = self.dropout(x_TD) @ self.A.T
        y_TE: Tensor = self.base(x_TD) + self.scaling * (h_TR @ self.B.T)
        return y_TE

    def delta(self) -> Tensor:
        """Return scaling B A, shape (E, D)."""
        return self.scaling * (self.B @ self.A)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the paper's letters to what trains."""
        return {"A": self.A, "B": self.B}

    def state(self) -> dict[str, Tensor]:
        """Return nothing: W0 is the base's."""
        return {}

    def merged(self) -> nn.Linear:
        """Return a linear layer with W0 + scaling B A (section 4: no additional inference latency)."""
        dense = dense_copy(self.base)
        with torch.no_grad():
            dense.weight += self.delta().to(dense.weight.dtype)
        return dense


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> Adapted:
    """Freeze `model` and put a LoraLinear around every target; A is drawn from `generator` in order of the paths.

    Raises ValueError if a target names no linear layer.
    """
    model.requires_grad_(False)
    layers = {}
    for path, base in targets(model, config.targets).items():
        E, D = base.out_features, base.in_features
        dtype, device = floating_dtype(base), next(base.parameters()).device
        bound = 1 / math.sqrt(D)
        # Drawn in float64 so that every dtype starts from the same numbers.
        A = torch.empty(config.rank, D, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
        B = torch.zeros(E, config.rank, dtype=dtype, device=device)
        scaling = config.alpha / config.rank
        layers[path] = LoraLinear(base, A.to(device, dtype), B, scaling, config.dropout)
        replace(model, path, layers[path])
    return Adapted(model, layers)
