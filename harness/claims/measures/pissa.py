"""Measures: properties of PiSSA and QPiSSA (arXiv:2404.02948), checked on the reference of PiSSA.

The weights are synthetic: their singular vectors are random, and their singular values fall as a power of the index.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from harness.claims.measure import MeasureResult, Positive, measure

if TYPE_CHECKING:
    from torch import Tensor

Dtype = Literal["float64", "float32", "bfloat16", "float16"]
ResidualOf = Literal["this step", "the step before"]
_SEED = 0


@measure("property")
def pissa_splits_the_weight(
    rank: Positive, rows: Positive = 96, columns: Positive = 128, decay: float = 0.5, niter: int = 0,
    dtype: Dtype = "float32",
) -> MeasureResult:  # fmt: skip
    """Check whether PiSSA's residual plus s B A is the original weight. s is the scaling of the factors A and B.

    The allowed error is the error of rounding the weight to `dtype`, the dtype of A, B and the residual. niter:
    iterations of the randomised SVD; 0 for the exact SVD. decay: the k-th singular value of the weight is k^-decay.
    """
    W = _weight(rows, columns, decay)
    A, B, residual, scaling = _split(W, rank, niter, dtype)
    total = {"residual + s B A": residual.double() + scaling * B.double() @ A.double()}
    return _judged(total, {"residual + s B A": W}, dtype)


@measure("property")
def pissa_takes_the_principal_part(
    rank: Positive, rows: Positive = 96, columns: Positive = 128, decay: float = 0.5, dtype: Dtype = "float64"
) -> MeasureResult:
    """Check whether PiSSA's s B A consists of the weight's largest singular values and their vectors.

    s is the scaling of the factors A and B. The weight is made from known singular values and vectors. S_r holds the
    largest r values, and U_r and V_r hold their vectors. The result must be s B A = U_r S_r V_r^T. Each factor must
    have the square roots of the values: s A A^T = s B^T B = S_r. decay: the k-th singular value of the weight is
    k^-decay.
    """
    import torch

    U, S, V = _parts(rows, columns, decay)
    A, B, _, scaling = _split((U * S) @ V.T, rank, 0, dtype)
    A, B = A.double(), B.double()
    found = {"s B A": scaling * B @ A, "s A A^T": scaling * A @ A.T, "s B^T B": scaling * B.T @ B}
    best, values = (U[:, :rank] * S[:rank]) @ V[:, :rank].T, torch.diag(S[:rank])
    return _judged(found, {"s B A": best, "s A A^T": values, "s B^T B": values}, dtype)


@measure("number")
def fast_svd_error(
    rank: Positive, niter: Positive, rows: Positive = 192, columns: Positive = 256, decay: float = 0.5
) -> MeasureResult:
    """Error of the principal part of a weight by the fast SVD: the sum of the absolute differences from the exact
    SVD's.

    The two parts are compared element by element, in float64. niter: iterations of the fast SVD.
    """
    import torch

    from reference import pissa

    W = _weight(rows, columns, decay)
    fast = pissa.fast_svd(W, rank, niter, torch.Generator().manual_seed(_SEED))
    found = float((_product(*fast) - _principal(W, rank)).abs().sum())
    return MeasureResult(found, f"niter {niter}: {found:.4g}")


@measure("property")
def pissa_is_a_lora(rank: Positive, lora_rank: Positive, rows: Positive = 96, columns: Positive = 128) -> MeasureResult:
    """Check whether a trained PiSSA equals a LoRA of rank `lora_rank` on the original weight W, in float64.

    The equation is W + s B' A' = W_res + s B A. B' and A' are LoRA's factors, W_res is PiSSA's residual, and s is the
    scaling.
    """
    from reference import pissa

    W = _weight(rows, columns, 0.5)
    A0, B0, residual, scaling = _split(W, rank, 0, "float64")
    A, B = A0 + _normal(*A0.shape), B0 - _normal(*B0.shape)  # as if trained
    A2, B2 = pissa.to_lora(A0, B0, A, B)
    if len(A2) != lora_rank:
        return MeasureResult(False, f"it is a LoRA of rank {len(A2)}")
    lora = {"W + s B' A'": W + scaling * B2 @ A2}
    return _judged(lora, {"W + s B' A'": residual + scaling * B @ A}, "float64")


@measure("property")
def pissa_starts_at_the_model(
    rank: Positive, dropout: float, rows: Positive = 96, columns: Positive = 128
) -> MeasureResult:
    """Check whether attaching PiSSA preserves the output of a layer in training mode.

    dropout: probability of LoRA's dropout on the adapter's input. Raises ValueError if it is not a probability.
    """
    import torch
    from torch import nn

    from reference.lora import LoraLinear

    W = _weight(rows, columns, 0.5)
    A, B, residual, scaling = _split(W, rank, 0, "float64")
    base = nn.Linear(columns, rows, bias=False, dtype=torch.float64)
    base.weight.data = residual
    x = _normal(64, columns)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(_SEED)
        y = LoraLinear(base, A, B, scaling, dropout).train()(x)
    return _judged({"output": y}, {"output": x @ W.T}, "float64")


@measure("share")
def quantisation_error_reduced(
    by: Literal["loftq", "qpissa"],
    rank: Positive,
    iterations: Positive = 1,
    residual_of: Literal["this step", "the step before"] = "the step before",
    size: Positive = 256,
    decay: float = 0.5,
) -> MeasureResult:
    """Relative reduction of QLoRA's quantisation error by LoftQ or QPiSSA, before training (eqs. 6 to 8).

    The error is the nuclear norm of W - (Q + B A), where W is the weight and Q is stored in 4 bits. In QLoRA, Q is
    nf4(W), and B A is 0.

    by: `loftq` begins with B A = 0. Each iteration sets Q to nf4(W - B A), and then takes A and B from the SVD of W -
    Q. `qpissa` begins with A and B from the SVD of W, and Q is nf4(residual). Each further iteration takes A and B from
    the SVD of W - Q, and then updates the residual. residual_of: whether the residual is updated with the A and B of
    this iteration or of the one before (Algorithm 1, line 5).
    """
    W = _weight(size, size, decay)
    plain = _nuclear(W - _nf4(W))
    if by == "loftq":
        found = _nuclear(W - _loftq(W, rank, iterations))
    else:
        *_, (residual, product) = _iterate(W, rank, iterations, residual_of)
        found = _nuclear(W - _nf4(residual) - product)
    return MeasureResult(1 - found / plain, f"{by} in {iterations} iterations: 1 - {found:.5g} / {plain:.5g}")


@measure("property")
def each_turn_is_another(
    rank: Positive, iterations: Positive, residual_of: ResidualOf, size: Positive = 128, decay: float = 0.5
) -> MeasureResult:
    """Check whether each iteration of the QPiSSA paper's Algorithm 1 changes A and B.

    residual_of: whether line 5 updates the residual with the A and B of this step or of the step before.
    """
    import torch

    products = [product for _, product in _iterate(_weight(size, size, decay), rank, iterations, residual_of)]
    equal = [t for t, (one, after) in enumerate(pairwise(products), start=2) if torch.equal(one, after)]
    how = "; ".join(f"A and B at t = {t} equal those at t = {t - 1}" for t in equal)
    return MeasureResult(not equal, how or f"{len(products)} different pairs of A and B")


def _iterate(W: Tensor, rank: int, iterations: int, residual_of: ResidualOf) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the residual and B A after each iteration of QPiSSA's Algorithm 1. The first is PiSSA's initialisation.

    In the second iteration, line 5 reads A_1 and B_1, but no printed line sets them. Here they are the initial A and B.
    """
    product = before = _principal(W, rank)
    residual = W - product
    yield residual, product
    for _ in range(1, iterations):
        product = _principal(W - _nf4(residual), rank)
        residual = W - (product if residual_of == "this step" else before)
        before = product
        yield residual, product


def _loftq(W: Tensor, rank: int, iterations: int) -> Tensor:
    """Return Q + B A after `iterations` iterations of LoftQ, where Q is the quantised weight (eq. 11).

    LoftQ begins with B A = 0, and alternates between quantisation and SVD.
    """
    product = W * 0
    for _ in range(iterations):
        quantised = _nf4(W - product)
        product = _principal(W - quantised, rank)
    return quantised + product


def _nf4(W: Tensor) -> Tensor:
    from reference.operations import nf4

    return nf4.dequantize(*nf4.quantize(W)).view_as(W).double()


def _nuclear(M: Tensor) -> float:
    import torch

    return float(torch.linalg.matrix_norm(M, "nuc"))


def _principal(W: Tensor, rank: int) -> Tensor:
    from reference import pissa

    return _product(*pissa.exact_svd(W, rank))


def _product(U: Tensor, S: Tensor, Vt: Tensor) -> Tensor:
    return (U * S) @ Vt


def _split(W: Tensor, rank: int, niter: int, dtype: str) -> tuple[Tensor, Tensor, Tensor, float]:
    """Split a weight by PiSSA's reference. Return A, B, the residual and the scaling.

    alpha differs from the rank, so that the scaling is not 1.
    """
    import torch

    from harness.conformance.subject import DTYPES
    from reference import pissa

    if rank > min(W.shape):
        raise ValueError(f"a weight of {W.shape[0]} x {W.shape[1]} has fewer than {rank} singular values; lower `rank`")
    config = pissa.Config(rank=rank, alpha=2.0 * rank, niter=niter)
    A, B, residual = pissa.split(W, config, DTYPES[dtype], torch.Generator().manual_seed(_SEED))
    return A, B, residual, config.alpha / config.rank


def _weight(rows: int, columns: int, decay: float) -> Tensor:
    U, S, V = _parts(rows, columns, decay)
    return (U * S) @ V.T


def _parts(rows: int, columns: int, decay: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular vectors and values (U, S, V) of a random weight, in float64.

    The k-th singular value is k^-decay.
    """
    import torch

    few = min(rows, columns)
    U, V = (torch.linalg.qr(_normal(side, few, seed)).Q for side, seed in ((rows, 1), (columns, 2)))
    return U, torch.arange(1, few + 1, dtype=torch.float64) ** -decay, V


def _normal(rows: int, columns: int, seed: int = 3) -> Tensor:
    import torch

    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _judged(found: dict[str, Tensor], truth: dict[str, Tensor], dtype: str) -> MeasureResult:
    """Return, as the result of a property, whether the tensors in `found` agree with those in `truth`.

    As in the conformance suite, the tolerance comes from the error of rounding `truth` to the dtype.
    """
    from harness.conformance.comparison.tolerance_policies import noise_floor
    from harness.conformance.subject import DTYPES

    rounded: dict[str, Any] = {name: t.to(DTYPES[dtype]).double() for name, t in truth.items()}
    judged = noise_floor(found, truth, rounded, dtype)
    error = "not finite" if judged.error is None else f"{judged.error:.2g}"
    how = f"{judged.tensor}: error {error}, allowed {judged.allowed or 0:.2g} ({judged.policy})"
    return MeasureResult(judged.passed, how)
