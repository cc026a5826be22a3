"""LoHa: Low-rank adaptation with Hadamard product. Yeh et al., ICLR 2024, arXiv:2309.14859.

    h = W0 x + (alpha / r) ((B1 A1) * (B2 A2)) x                                                        (paper, eq. 3)

`*` multiplies element by element. A1, A2 (R, D) and B1, B2 (E, R) train, and W0 (E, D) is frozen. The product of two
matrices of rank R has a rank of up to R^2, with 2 R (D + E) numbers (FedPara, Hyeon-Woo et al., ICLR 2022,
arXiv:2108.06098, proposition 1). Shape letters: T tokens, D input features, E output features, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayer, AdaptedLayers
from reference.shared.layers import device_of, floating_dtype, replace, targets
from reference.shared.row_dropout import RowDropout
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2309.14859v2, section 3.2",
    deviations=(
        Deviation(
            topic="initialisation",
            paper="not given; FedPara, which trains from scratch, uses He's",
            here="A2 is zero; A1, B1 and B2 are uniform in +-1/sqrt(columns)",
            why="HF peft does the same. The authors' code (LyCORIS) draws A1 and A2 with deviation 1, B1 with 0.1, and "
            "sets B2 to zero",
        ),
        Deviation(
            topic="rank dropout",
            paper="not in the formulas",
            here="rank_dropout drops rows of the update, and divides the others by their share; if no row remains, the "
            "update is zero. A call draws one mask for all its tokens, from torch's global generator",
            why="HF peft does the same, but computes 0 / 0 if no row remains; LyCORIS divides only with "
            "rank_dropout_scale",
        ),
        Deviation(
            topic="module dropout",
            paper="not in the formulas",
            here="not offered",
            why="it skips the update of a whole layer; HF peft and LyCORIS have it, and `method: peft` trains with it",
        ),
        Deviation(
            topic="convolutions",
            paper="the kernel as a matrix, or a decomposition with a third factor (FedPara, proposition 3)",
            here="linear layers only",
            why="HF peft and LyCORIS adapt convolutions too; `method: peft` trains them",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of LoHa."""

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 4096})
    """Rank r of each of the two products."""
    alpha: float = field(default=8.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    rank_dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that a row of the update (one output feature) is dropped in training. The kept rows are divided by the
    fraction of rows that are kept."""

    @property
    def scaling(self) -> float:
        """Factor on the update: alpha / r (section 3.2)."""
        return self.alpha / self.rank


class LohaLinear(AdaptedLayer):
    """A frozen linear layer (..., D) -> (..., E) with the update (B1 A1) * (B2 A2). A1, A2 (R, D), B1, B2 (E, R) train."""

    base: nn.Linear
    """The original layer, an nn.Linear or a quantised subclass."""

    def __init__(
        self, base: nn.Linear, A1: Tensor, B1: Tensor, A2: Tensor, B2: Tensor, scaling: float, rank_dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.A1, self.B1 = nn.Parameter(A1), nn.Parameter(B1)
        self.A2, self.B2 = nn.Parameter(A2), nn.Parameter(B2)
        self.scaling, self.rank_dropout = scaling, RowDropout(rank_dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 x + scaling ((B1 A1) * (B2 A2)) x (eq. 3), shape (..., E)."""
        y_TE: Tensor = self.base(x_TD) + x_TD @ self.rank_dropout(self.delta()).T
        return y_TE

    def delta(self) -> Tensor:
        """Return scaling (B1 A1) * (B2 A2), shape (E, D)."""
        return self.scaling * ((self.B1 @ self.A1) * (self.B2 @ self.A2))

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names A1, B1, A2 and B2 to the trainable parameters."""
        return {"A1": self.A1, "B1": self.B1, "A2": self.A2, "B2": self.B2}


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model` and wrap every target in a LohaLinear. `generator` draws A1, B1 and B2, in the model's order of layers.

    A2 starts at zero. Raises ValueError if a target names no linear layer.
    """
    model.requires_grad_(False)
    layers = {}
    for path, base in targets(model, config.targets).items():
        E, D, R = base.out_features, base.in_features, config.rank
        like: dict[str, Any] = {"dtype": floating_dtype(base), "device": device_of(base)}
        A1, B1, B2 = (_uniform(*shape, generator).to(**like) for shape in ((R, D), (E, R), (E, R)))
        A2 = torch.zeros(R, D, **like)
        layers[path] = LohaLinear(base, A1, B1, A2, B2, config.scaling, config.rank_dropout)
        replace(model, path, layers[path])
    return AdaptedLayers(model, layers)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix (rows, columns) in float64, uniform in +-1/sqrt(columns)."""
    bound = columns**-0.5
    return torch.empty(rows, columns, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
