"""LoKr: Low-rank adaptation with Kronecker product. Yeh et al., ICLR 2024, arXiv:2309.14859.

    h = W0 x + (alpha / r) (C kron (B A)) x                                                             (paper, eq. 4)

The layer's sizes are products, E = U_E V_E and D = U_D V_D. C (U_E, U_D), B (V_E, R) and A (R, V_D) train, and W0 (E,
D) is frozen. In each product, U is the largest divisor of the size that is at most min(factor, sqrt(size)) (eq. 5). If
R is at least half of the larger of V_E and V_D, a full matrix W2 (V_E, V_D) takes the place of B A. Shape letters: T
tokens, D input features, E output features, R rank.
"""

from __future__ import annotations

import math
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
            topic="decomposition of the right block",
            paper="optional",
            here="B A if R is less than half of the larger side of the block, otherwise a full matrix W2",
            why="the authors' code (LyCORIS) and HF peft do the same. Both can decompose C, too (decompose_both), which "
            "the paper does not have and this reference does not offer",
        ),
        Deviation(
            topic="factor",
            paper="u is at most min(factor, sqrt(size))",
            here="the same; a factor below 1 sets no limit",
            why="HF peft takes a factor that divides the size even above its square root, so that its left block may "
            "be the larger one",
        ),
        Deviation(
            topic="initialisation",
            paper="not given",
            here="init=peft: C is zero. init=lycoris: A, or W2, is zero. The others are uniform in +-1/sqrt(columns)",
            why="HF peft has both starts; the second is that of the authors' code (LyCORIS)",
        ),
        Deviation(
            topic="scaling",
            paper="alpha / r",
            here="the same for a full W2",
            why="HF peft does the same; LyCORIS does not scale if both blocks are full",
        ),
        Deviation(
            topic="rank dropout",
            paper="not in the formulas",
            here="rank_dropout drops rows of the update, and divides the others by their share; if no row remains, the "
            "update is zero. A call draws one mask for all its tokens, from torch's global generator",
            why="HF peft and LyCORIS do the same with rank_dropout_scale, but compute 0 / 0 if no row remains; without "
            "it, they do not divide",
        ),
        Deviation(
            topic="module dropout and convolutions",
            paper="the first is not in the formulas; kernels are adapted like matrices",
            here="not offered",
            why="HF peft and LyCORIS have both, and `method: peft` trains with them",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of LoKr."""

    rank: int = field(default=8, metadata={"minimum": 1, "maximum": 4096})
    """Rank r of the right block B A."""
    alpha: float = field(default=8.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    factor: int = field(default=-1, metadata={"minimum": -1, "maximum": 4096})
    """Largest number of rows and of columns of the left block C. A value below 1 sets no limit besides sqrt(size)."""
    init: str = field(default="peft", metadata={"choices": ("peft", "lycoris")})
    """`peft`: the left block starts at zero, as in HF peft. `lycoris`: the right block (A, or W2)
    starts at zero, as in LyCORIS."""
    rank_dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that a row of the update (one output feature) is dropped in training. The kept rows are divided by the
    fraction of rows that are kept."""

    @property
    def scaling(self) -> float:
        """Factor on the update: alpha / r (section 3.2)."""
        return self.alpha / self.rank


def divided(size: int, factor: int) -> tuple[int, int]:
    """Return (u, v) with u v = size. u is the largest divisor of `size` up to min(factor, sqrt(size)) (eq. 5).

    A factor below 1 sets no limit besides sqrt(size).
    """
    root = math.isqrt(size)
    most = root if factor < 1 else min(factor, root)
    u = max(n for n in range(1, most + 1) if size % n == 0)
    return u, size // u


class LokrLinear(AdaptedLayer):
    """A frozen linear layer (..., D) -> (..., E) with the update C kron (B A), or C kron W2.

    C (U_E, U_D), B (V_E, R), A (R, V_D) and W2 (V_E, V_D) train. `right` holds either B and A, or W2.
    """

    base: nn.Linear
    """The original layer, an nn.Linear or a quantised subclass."""

    def __init__(
        self, base: nn.Linear, C: Tensor, right: dict[str, Tensor], scaling: float, rank_dropout: float
    ) -> None:
        super().__init__()
        self.base = base
        self.C = nn.Parameter(C)
        self.right = nn.ParameterDict(right)
        self.scaling, self.rank_dropout = scaling, RowDropout(rank_dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 x + scaling (C kron (B A)) x (eq. 4), shape (..., E)."""
        y_TE: Tensor = self.base(x_TD) + x_TD @ self.rank_dropout(self.delta()).T
        return y_TE

    def delta(self) -> Tensor:
        """Return scaling C kron (B A), or scaling C kron W2, shape (E, D)."""
        block = self.right["W2"] if "W2" in self.right else self.right["B"] @ self.right["A"]
        # torch.kron raises for some layouts, e.g. if values came as a transposed view.
        C, block = self.C.contiguous(), block.contiguous()
        return self.scaling * torch.kron(C, block)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names C, B and A, or C and W2, to the trainable parameters."""
        return {"C": self.C, **self.right}


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model` and wrap every target in a LokrLinear. `generator` draws the factors, layer by layer.

    It draws C, B and A, or C and W2, but not the factor that starts at zero: C with init=peft, else A or W2. Raises
    ValueError if a target names no linear layer.
    """
    model.requires_grad_(False)
    layers = {}
    for path, base in targets(model, config.targets).items():
        (U_E, V_E), (U_D, V_D) = divided(base.out_features, config.factor), divided(base.in_features, config.factor)
        full = config.rank >= max(V_E, V_D) / 2
        shapes = {"W2": (V_E, V_D)} if full else {"B": (V_E, config.rank), "A": (config.rank, V_D)}
        zero = "C" if config.init == "peft" else "W2" if full else "A"
        like: dict[str, Any] = {"dtype": floating_dtype(base), "device": device_of(base)}
        drawn = {
            name: torch.zeros(shape, **like) if name == zero else _uniform(*shape, generator).to(**like)
            for name, shape in {"C": (U_E, U_D), **shapes}.items()
        }
        layers[path] = LokrLinear(base, drawn.pop("C"), drawn, config.scaling, config.rank_dropout)
        replace(model, path, layers[path])
    return AdaptedLayers(model, layers)


def _uniform(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Draw a matrix (rows, columns) in float64, uniform in +-1/sqrt(columns)."""
    bound = columns**-0.5
    return torch.empty(rows, columns, dtype=torch.float64).uniform_(-bound, bound, generator=generator)
