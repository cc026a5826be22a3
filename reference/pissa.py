"""PiSSA: Principal Singular Values and Singular Vectors Adaptation. Meng et al., NeurIPS 2024, arXiv:2404.02948.

    W = U S V^T;  A, B from the r largest singular values (eqs. 2, 3);  W_res = the rest, frozen (eq. 4)
    h = W_res x + (alpha / r) B A x                                     (eq. 5)

As in LoRA, A is (R, D) and B is (E, R). Unlike in LoRA, B A begins as the principal part of W, and W_res replaces W.
Shape letters: T tokens, D input features, E output features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from reference.shared.adapted import AdaptedLayer, AdaptedLayers, LowRankLayer
from reference.shared.layers import (
    as_stored,
    dense_copy,
    dense_weight,
    features_in_out,
    floating_dtype,
    kind_of,
    replace,
    targets,
)
from reference.shared.lora_layers import LoraEmbedding
from reference.shared.randomised_svd import randomised_svd
from reference.spec import Deviation, ReferenceSpec

SPEC = ReferenceSpec(
    paper="arXiv:2404.02948v4",
    factors=("A", "B"),
    replaces_weight="residual",
    start_from_weight=("residual",),
    quick_start={"niter": 1},
    deviations=(
        Deviation(
            topic="shapes of A and B",
            paper="Y = X W with W (in, out), A (in, r) = U sqrt(S), B (r, out) = sqrt(S) V^T",
            here="A (r, in), B (out, r), as LoRA's: each is the transpose of the paper's of the same name",
            why="the weight is stored as (out, in), the transpose of the paper's W, so that U and V are exchanged: "
            "our A holds right singular vectors of the stored weight, which are left ones of the paper's W. HF peft "
            "does the same",
        ),
        Deviation(
            topic="scaling",
            paper="none: X (W_res + A B)",
            here="alpha / r; both initial factors are divided by its root, so that (alpha / r) B A is the principal "
            "part",
            why="HF peft does the same; with alpha = r, as in the authors' scripts, it equals the paper's form",
        ),
        Deviation(
            topic="signs of the singular vectors",
            paper="not determined by the SVD",
            here="before A is rounded, the entry of largest magnitude in each of its rows is positive; of equal entries the "
            "first counts",
            why="two correct programs may differ by a sign per component, and a start that is compared must be unique",
        ),
        Deviation(
            topic="fast SVD",
            paper="a randomised SVD (Halko et al.), with more or fewer iterations",
            here="Halko's subspace iteration with exactly r columns, no oversampling: Q = qr(W sketch), then niter times "
            "qr(W^T Q) and qr(W Q), with W^T in the place of W if E < D; niter = 0 is the exact SVD",
            why="HF peft's pissa_niter_N is torch.svd_lowrank with q = r, and its niter_0 a sketch without "
            "iterations. Our sketch is a float64 torch.randn of shape (min(E, D), r) from the generator; HF peft "
            "draws it from global state, and again when it loads a saved adapter, so that its residual differs. An "
            "implementation may draw another sketch from the generator",
        ),
        Deviation(
            topic="precision",
            paper="not stated",
            here="the SVD runs in at least float32; A and B are rounded to the layer's dtype, then W_res = W - "
            "(alpha / r) B A is computed from the rounded factors and rounded once",
            why="W_res then holds the rounding errors of A and B, and W_res + (alpha / r) B A equals W within half "
            "an eps of |W_res|. HF peft computes W_res before it rounds A and B to half precision",
        ),
        Deviation(
            topic="quantised base (QPiSSA)",
            paper="quantises W_res, which has a smaller spread than W, and may iterate (Algorithm 1)",
            here="decomposes the matrix that the base multiplies by; W_res stays dense",
            why="a packed base has already lost the precision that QPiSSA would save; the caller may quantise W_res",
        ),
        Deviation(
            topic="dropout",
            paper="none",
            here="none, and no option for it",
            why="dropping inputs of the principal part would change the function before the first step",
        ),
        Deviation(
            topic="embeddings",
            paper="not treated",
            here="the transposed table is W, as in LoRA: A (r, num) picks columns by id, B (dim, r)",
            why="the paper's equations apply to this layer too. HF peft also supports embeddings, but silently "
            "starts them as plain LoRA",
        ),
    ),
)


KINDS = ("linear", "Conv1D", "embedding")
"""Kinds of layers that PiSSA adapts."""


@dataclass(frozen=True)
class Config:
    """Hyperparameters of PiSSA."""

    rank: int = field(default=16, metadata={"minimum": 1, "maximum": 4096})
    """Number r of singular values that train; at most the smaller side of a layer's weight."""
    alpha: float = field(default=16.0, metadata={"minimum": 1e-3, "maximum": 1e4})
    """Numerator of the scaling alpha / rank."""
    targets: tuple[str, ...] = ("q_proj", "v_proj")
    """Layers to adapt: ends of module paths, whole paths, `attention` or `all-linear`."""
    niter: int = field(default=0, metadata={"minimum": 0, "maximum": 100})
    """Subspace iterations of the randomised SVD; 0 for the exact SVD."""


def exact_svd(W_ED: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U (E, R), S (R,) and Vt (R, D) of W for the `rank` largest singular values. LAPACK chooses the signs."""
    U, S, Vt = torch.linalg.svd(W_ED, full_matrices=False)
    return U[:, :rank], S[:rank], Vt[:rank]


def fast_svd(W_ED: Tensor, rank: int, niter: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return approximations of U (E, R), S (R,) and Vt (R, D) for the `rank` largest singular values, by a randomised SVD.

    niter: number of subspace iterations. LAPACK chooses the signs.
    """
    return randomised_svd(W_ED, sketch(W_ED, rank, generator), niter)


def sketch(W_ED: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Return the random start (min(E, D), R) of a randomised SVD, from a standard normal distribution.

    It is drawn in float64 on the CPU, and then converted to the dtype and device of W.
    """
    return torch.randn(min(W_ED.shape), rank, generator=generator, dtype=torch.float64).to(W_ED)


def signed(U_ER: Tensor, Vt_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Return U and Vt with unique signs. In each row of Vt, the entry of largest magnitude becomes positive."""
    largest = Vt_RD.abs().argmax(dim=1, keepdim=True)
    sign = torch.where(Vt_RD.gather(1, largest) < 0, -1.0, 1.0).to(Vt_RD.dtype)
    return U_ER * sign.T, Vt_RD * sign


def split(
    W_ED: Tensor, config: Config, dtype: torch.dtype, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return A (R, D), B (E, R) and a residual (E, D) with residual + (alpha / r) B A = W (eqs. 2 to 4), in `dtype`.

    The SVD and the subtraction run in float32, or in float64 for a float64 W. generator: used only if niter > 0, for a
    randomised SVD.
    """
    W = W_ED.to(torch.promote_types(W_ED.dtype, torch.float32))
    scaling = config.alpha / config.rank
    if config.niter:
        U, S, Vt = fast_svd(W, config.rank, config.niter, generator)
    else:
        U, S, Vt = exact_svd(W, config.rank)
    U, Vt = signed(U, Vt)
    root = (S / scaling).sqrt()
    # LAPACK returns U column by column. B gets the layout of any other B, because the layout affects how products round.
    A, B = (root[:, None] * Vt).to(dtype).contiguous(), (U * root).to(dtype).contiguous()
    residual = W - scaling * (B.to(W.dtype) @ A.to(W.dtype))
    return A, B, residual.to(dtype)


def to_lora(A0: Tensor, B0: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return A' (2R, D) and B' (E, 2R) of a LoRA on the original weight that equals a trained PiSSA (appendix).

    A0 (R, D), B0 (E, R): initial factors of the PiSSA. A, B: trained factors of the PiSSA. With the same scaling s for
    both, W + s B' A' = W_res + s B A. As the LoRA has rank 2R, its alpha must be twice that of the PiSSA.
    """
    # W = W_res + s B0 A0, so W_res + s B A = W + s (B A - B0 A0) = W + s [B, -B0] [A; A0].
    return torch.cat([A, A0], dim=0), torch.cat([B, -B0], dim=1)


class PissaLinear(LowRankLayer):
    """A linear layer with a trainable principal part from A (R, D) and B (E, R), and a frozen residual W_res (E, D).

    `base` is the original layer: an nn.Linear, a quantised subclass, or transformers' Conv1D. Only its bias is used for
    the output.
    """

    base: Any

    def __init__(self, base: nn.Module, A: Tensor, B: Tensor, residual: Tensor, scaling: float) -> None:
        super().__init__(base, A, B, scaling)
        self.register_buffer("residual", residual)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return W_res x + bias + scaling B A x, shape (..., E) (eq. 5)."""
        h_TR = x_TD @ self.A.T
        y_TE: Tensor = linear(x_TD, self.get_buffer("residual"), self.base.bias) + self.scaling * (h_TR @ self.B.T)
        return y_TE

    def state(self) -> dict[str, Tensor]:
        """Map the name `residual` to W_res (E, D)."""
        return {"residual": self.get_buffer("residual")}

    def merged(self) -> Any:
        """Return a plain layer with the weight W_res + scaling B A."""
        dense: Any = dense_copy(self.base)
        with torch.no_grad():
            dense.weight.copy_(as_stored(dense, self.get_buffer("residual") + self.delta()))
        return dense


class PissaEmbedding(AdaptedLayer):
    """An embedding table (N, E) with a trainable principal part from A (R, N) and B (E, R), and a frozen residual (E, N).

    `base` is the original table. It is not used for the output.
    """

    base: nn.Embedding

    def __init__(self, base: nn.Embedding, A: Tensor, B: Tensor, residual: Tensor, scaling: float) -> None:
        super().__init__()
        self.base = base
        rest: Any = dense_copy(base)
        rest.weight = nn.Parameter(residual.T, requires_grad=False)
        self.adapted = LoraEmbedding(rest, A, B, scaling)

    def forward(self, ids_T: Tensor) -> Tensor:
        """Return the entries `ids_T` of the table (W_res + scaling B A)^T, shape (..., E) (eq. 5)."""
        y_TE: Tensor = self.adapted(ids_T)
        return y_TE

    def tensors(self) -> dict[str, nn.Parameter]:
        """Map the names A and B to the trainable parameters."""
        return self.adapted.tensors()

    def state(self) -> dict[str, Tensor]:
        """Map the name `residual` to W_res (E, N)."""
        return {"residual": self.adapted.base.weight.data.T}

    def merged(self) -> Any:
        """Return an embedding with the table (W_res + scaling B A)^T."""
        return self.adapted.merged()


def attach(
    model: nn.Module, config: Config, generator: torch.Generator, split: Callable[..., tuple[Tensor, ...]] = split
) -> AdaptedLayers:
    """Freeze `model` and replace every target by a PissaLinear or a PissaEmbedding, in the model's order of layers.

    split: function that computes A, B and the residual, by default `split` of this module. Raises ValueError if a
    target names no linear layer, Conv1D or embedding, or if the rank exceeds the smaller side of a target's weight.
    """
    found = targets(model, config.targets, KINDS)
    for path, base in found.items():
        D, E = features_in_out(base)
        if config.rank > min(D, E):
            raise ValueError(
                f"rank {config.rank}: {path} maps {D} to {E} features and has only {min(D, E)} singular values"
            )
    model.requires_grad_(False)
    layers: dict[str, AdaptedLayer] = {}
    for path, base in found.items():
        with torch.no_grad():
            A, B, residual = split(dense_weight(base), config, floating_dtype(base), generator)
        kind = PissaEmbedding if kind_of(base) == "embedding" else PissaLinear
        layers[path] = kind(base, A, B, residual, config.alpha / config.rank)
        replace(model, path, layers[path])
    return AdaptedLayers(model, layers)
