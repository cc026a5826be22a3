"""VeRA: Vector-based Random Matrix Adaptation. Kopiczko et al., ICLR 2024, arXiv:2310.11454.

    h = W0 x + Lambda_b B Lambda_d A x                                                                  (paper, eq. 2)

W0 (E, D) is frozen. A (R, D) and B (E, R) are random and frozen, and all layers share them. Only the vectors b (E,) and
d (R,) train. They are the diagonals of Lambda_b and Lambda_d. Shape letters: T tokens, D input features, E output
features, R rank.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayer, AdaptedLayers
from reference.shared.layers import LINEAR_OR_CONV1D, device_of, features_in_out, floating_dtype, replace, targets
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2310.11454v2",
    start_from_config=("A", "B"),
    deviations=(
        Deviation(
            topic="layers of several shapes",
            paper="one pair of matrices for all layers, which have one shape",
            here="the pair is as large as the largest target, in each dimension; a layer uses the first D columns of "
            "A and the first E rows of B",
            why="HF peft does the same; the authors' code is not public",
        ),
        Deviation(
            topic="spread of A and B",
            paper="Kaiming initialisation by the matrix's dimensions, without a gain; uniform instead of normal, by "
            "its ablation",
            here="uniform in +-sqrt(6 / fan_in), which is a gain of sqrt(2); fan_in of the shared pair: the largest "
            "in for A, r for B",
            why="HF peft does the same; a slice has less variance than a separate matrix of its size",
        ),
        Deviation(
            topic="random numbers",
            paper="from a seed, which is stored instead of the matrices",
            here="from a separate generator on the CPU, seeded by projection_key, A before B, in float32, then cast; "
            "nothing is drawn from the generator of `attach`",
            why="these are the numbers of HF peft to the last bit; another version of PyTorch may draw others",
        ),
        Deviation(
            topic="saved tensors",
            paper="b, d and the seed",
            here="b and d; `state` shows A and B, which projection_key reproduces",
            why="HF peft also saves A and B, most of its files' size, unless save_projection is false",
        ),
        Deviation(
            topic="scaling",
            paper="no alpha",
            here="no alpha",
            why="d takes its place: it starts at 0.1, as in the paper's main experiments",
        ),
        Deviation(
            topic="dropout",
            paper="not in the formulas",
            here="on the input of A only; W0 x gets the whole input",
            why="LoRA and HF peft do the same",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of VeRA."""

    rank: int = field(default=256, metadata={"minimum": 1, "maximum": 16384})
    """Rank r of the shared matrices A and B."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    dropout: float = field(default=0.0, metadata={"minimum": 0.0, "maximum": 0.99})
    """Probability that an input feature of the adapter branch is dropped in training."""
    projection_key: int = field(default=0, metadata={"minimum": 0, "maximum": 9223372036854775807})
    """Seed of A and B. PyTorch's generator uses its lowest 32 bits."""
    d_initial: float = field(default=0.1, metadata={"minimum": -1e3, "maximum": 1e3})
    """Initial value of d."""


def projections(key: int, rank: int, in_features: int, out_features: int) -> tuple[Tensor, Tensor]:
    """Return the shared matrices A (R, D) and B (E, R), float32 on the CPU. D and E are those of the largest target.

    The four arguments determine A and B, so that a checkpoint need not store them. Another rank or in_features gives
    other numbers, not slices. The global generator, the default dtype and the default device have no effect.
    """
    generator = torch.Generator("cpu").manual_seed(key)

    def kaiming(rows: int, fan_in: int) -> Tensor:
        # The factors are multiplied in HF peft's order, because sqrt(6 / fan_in) may be rounded to another number.
        bound = math.sqrt(3) * (math.sqrt(2) / math.sqrt(fan_in))
        return torch.empty(rows, fan_in, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)

    return kaiming(rank, in_features), kaiming(out_features, rank)


class VeraLinear(AdaptedLayer):
    """A frozen linear layer (..., D) -> (..., E) with a random low-rank update. Trained vectors b (E,), d (R,) scale it."""

    base: nn.Module
    """The original layer: an nn.Linear, a quantised subclass, or transformers' Conv1D."""
    A: Tensor
    """Frozen matrix (R, D). It may be a view of a tensor that layers share."""
    B: Tensor
    """Frozen matrix (E, R). It may be a view of a tensor that layers share."""

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, b: Tensor, d: Tensor, dropout: float) -> None:
        super().__init__()
        self.base = base
        # Not persistent, so that a checkpoint holds only b and d, as the paper proposes.
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)
        self.b, self.d = nn.Parameter(b), nn.Parameter(d)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 x + Lambda_b B Lambda_d A x (eq. 2), shape (..., E). The diagonals of Lambda_b, Lambda_d are b, d."""
        h_TR = self.d * (self.dropout(x_TD) @ self.A.T)
        y_TE: Tensor = self.base(x_TD) + self.b * (h_TR @ self.B.T)
        return y_TE

    def delta(self) -> Tensor:
        """Return Lambda_b B Lambda_d A, shape (E, D)."""
        return (self.b[:, None] * self.B) @ (self.d[:, None] * self.A)

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names b and d to the trainable parameters."""
        return {"b": self.b, "d": self.d}

    def state(self) -> dict[str, Tensor]:
        """Map the names A and B to this layer's slices of the shared matrices."""
        return {"A": self.A, "B": self.B}


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model` and wrap every target in a VeraLinear. All layers share A and B, drawn with the seed `projection_key`.

    `generator` is not used, so the initial tensors do not depend on the run's seed. Raises ValueError if a target names
    neither a linear layer nor a Conv1D.
    """
    model.requires_grad_(False)
    found = targets(model, config.targets, LINEAR_OR_CONV1D)
    widest, tallest = (max(features_in_out(base)[side] for base in found.values()) for side in (0, 1))
    A_shared, B_shared = projections(config.projection_key, config.rank, widest, tallest)
    shared: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}
    layers = {}
    for path, base in found.items():
        D, E = features_in_out(base)
        dtype, device = floating_dtype(base), device_of(base)
        if (device, dtype) not in shared:  # layers on one device and in one dtype share a pair
            shared[device, dtype] = (A_shared.to(device, dtype), B_shared.to(device, dtype))
        A, B = shared[device, dtype]
        b = torch.zeros(E, dtype=dtype, device=device)
        d = torch.full((config.rank,), config.d_initial, dtype=dtype, device=device)
        layers[path] = VeraLinear(base, A[:, :D], B[:E], b, d, config.dropout)
        replace(model, path, layers[path])
    return AdaptedLayers(model, layers)
