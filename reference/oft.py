"""OFT: Orthogonal Finetuning. Qiu et al., NeurIPS 2023, arXiv:2306.07280; OFTv2, EMNLP 2025, arXiv:2506.19847.

    h = W0 R^T x, R = diag(R_1, ..., R_n), R_i = (I + Q_i) (I - Q_i)^-1              (OFTv2, eq. 2 and section 3.1)
    R_i = (I + Q_i) (I + Q_i + ... + Q_i^k)                             (Cayley-Neumann, OFTv2, section 3.3)

W0 (E, D) is frozen. Each Q_i is skew-symmetric, K by K, and only the numbers above its diagonal train. So R is
orthogonal with the first form, and nearly so with the second one. The papers write W0^T where this file writes W0.
Shape letters: T tokens, D input features, E output features, N blocks, K size of a block, N K = D.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from reference.shared.adapted import AdaptedLayer, AdaptedLayers
from reference.shared.layers import device_of, floating_dtype, replace, targets
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2506.19847v2, section 3; arXiv:2306.07280v3, section 3.3",
    deviations=(
        Deviation(
            topic="direction of the rotation",
            paper="R = (I + Q) (I - Q)^-1",
            here="the same for both values of `cayley`, with the trained numbers above the diagonal of Q",
            why="HF peft computes the inverse, (I - Q) (I + Q)^-1, with use_cayley_neumann=False, and this R otherwise: "
            "changing the flag of a trained adapter turns its rotation around",
        ),
        Deviation(
            topic="terms of the series",
            paper="k powers of Q",
            here="terms = k + 2, the number of terms of the polynomial I + 2 Q + ... + 2 Q^k + Q^(k+1)",
            why="HF peft counts like this from 4 terms on; with 2 its last term is doubled, and 3 gives what 4 gives",
        ),
        Deviation(
            topic="block size that does not divide the input features",
            paper="it divides them",
            here="the largest divisor of the input features that is at most block_size",
            why="HF peft takes the nearest divisor, which may be larger",
        ),
        Deviation(
            topic="numbers of Q",
            paper="OFT's code stores K^2 numbers for each block; OFTv2 stores K (K - 1) / 2",
            here="K (K - 1) / 2, row by row above the diagonal",
            why="HF peft does the same",
        ),
        Deviation(
            topic="further variants",
            paper="a bound on the deviation from the identity (COFT), one block shared by all, magnitudes",
            here="not offered",
            why="HF peft has the first two, and `method: peft` trains with them; its module_dropout changes nothing",
        ),
    ),
)


@dataclass(frozen=True)
class Config:
    """Hyperparameters of OFT."""

    block_size: int = field(default=32, metadata={"minimum": 2, "maximum": 4096})
    """Largest size K of a block. A layer uses the largest divisor of its input features up to this size."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    cayley: str = field(default="neumann", metadata={"choices": ("neumann", "exact")})
    """Parameterisation of R: the series `neumann`, as in OFTv2, or the `exact` Cayley transform, as in OFT."""
    terms: int = field(default=5, metadata={"minimum": 2, "maximum": 64})
    """Number of terms, k + 2, of R_i as a polynomial in Q_i. With cayley=exact it has no effect."""


def skew_symmetric(packed: Tensor, size: int) -> Tensor:
    """Return the skew-symmetric matrices Q (N, K, K). `packed` (N, K (K - 1) / 2) holds their rows above the diagonal."""
    rows, columns = torch.triu_indices(size, size, 1, device=packed.device)
    upper = torch.zeros(len(packed), size * size, dtype=packed.dtype, device=packed.device)
    upper = upper.index_copy(1, rows * size + columns, packed).view(-1, size, size)
    return upper - upper.mT


def rotations(packed: Tensor, size: int, cayley: str, terms: int) -> Tensor:
    """Return R (N, K, K), computed from `packed` (N, K (K - 1) / 2).

    The result has the dtype of `packed`. In 16 bits, the exact form is computed in float32 and rounded, because torch
    solves no equations in 16 bits. cayley, terms: as in `Config`.
    """
    if cayley == "exact":
        wide = packed if packed.dtype in (torch.float32, torch.float64) else packed.float()
        Q = skew_symmetric(wide, size)
        identity = torch.eye(size, dtype=Q.dtype, device=Q.device)
        R: Tensor = torch.linalg.solve(identity - Q, identity + Q)
        return R.to(packed.dtype)
    Q = skew_symmetric(packed, size)
    identity = torch.eye(size, dtype=Q.dtype, device=Q.device)
    power = series = identity.expand_as(Q)
    for _ in range(terms - 2):
        power = power @ Q
        series = series + power
    return (identity + Q) @ series


class OftLinear(AdaptedLayer):
    """A frozen linear layer (..., D) -> (..., E) whose input is rotated block by block. Q (N, K (K - 1) / 2) trains."""

    base: nn.Linear
    """The original layer, an nn.Linear or a quantised subclass."""

    def __init__(self, base: nn.Linear, Q: Tensor, size: int, cayley: str, terms: int) -> None:
        super().__init__()
        self.base = base
        self.Q = nn.Parameter(Q)
        self.size, self.cayley, self.terms = size, cayley, terms

    def rotation(self) -> Tensor:
        """Return the blocks R_i of R, shape (N, K, K)."""
        return rotations(self.Q, self.size, self.cayley, self.terms)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W0 R^T x (OFTv2, eq. 2), shape (..., E)."""
        x_TNK = x_TD.unflatten(-1, (-1, self.size))
        y_TE: Tensor = self.base(torch.einsum("...nk,nkc->...nc", x_TNK, self.rotation()).flatten(-2))
        return y_TE

    def rotated(self, W_ED: Tensor) -> Tensor:
        """Return W R^T for a weight W, shape (E, D)."""
        W_ENK = W_ED.unflatten(-1, (-1, self.size))
        return torch.einsum("enc,nkc->enk", W_ENK, self.rotation().to(W_ENK.dtype)).flatten(-2)

    def merged(self) -> Any:
        """Return a plain layer with the same output: the base with the weight W0 R^T."""
        dense: Any = self.dense_base()
        with torch.no_grad():
            dense.weight.copy_(self.rotated(dense.weight))
        return dense

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the name Q to the trainable parameter."""
        return {"Q": self.Q}


def block_of(features: int, largest: int) -> int:
    """Return the largest divisor of `features` that is at most `largest`."""
    return max(k for k in range(1, min(features, largest) + 1) if features % k == 0)


def blocks(found: Mapping[str, nn.Linear], largest: int) -> dict[str, int]:
    """Map the paths of linear layers to the sizes K of their blocks.

    Raises ValueError for a layer if no number from 2 to `largest` divides the number of its input features.
    """
    sizes = {path: block_of(base.in_features, largest) for path, base in found.items()}
    for path, size in sizes.items():
        if size == 1:
            problem = f"{found[path].in_features} input features cannot be divided into blocks of 2 to {largest}"
            raise ValueError(f"{path}: {problem}; leave it out of targets, or raise block_size")
    return sizes


def attach(model: nn.Module, config: Config, generator: torch.Generator) -> AdaptedLayers:
    """Freeze `model` and wrap every target in an OftLinear. R starts as the identity, so nothing is drawn.

    Raises ValueError if a target names no linear layer, or if a layer's input features cannot be divided.
    """
    found = targets(model, config.targets)
    sizes = blocks(found, config.block_size)
    model.requires_grad_(False)
    layers = {}
    for path, base in found.items():
        size = sizes[path]
        shape = base.in_features // size, size * (size - 1) // 2
        Q = torch.zeros(shape, dtype=floating_dtype(base), device=device_of(base))
        layers[path] = OftLinear(base, Q, size, config.cayley, config.terms)
        replace(model, path, layers[path])
    return AdaptedLayers(model, layers)
