"""Measures: numbers of parameters and ranks of LoKr's two blocks, whose Kronecker product is the update."""

from __future__ import annotations

from harness.claims.measure import MeasureResult, Positive, measure
from harness.claims.measures.baselines import Sides
from harness.claims.measures.models_without_presets import linear_trainable, random_update


@measure("property")
def kronecker_counts_by_formula(sides: list[Sides], factors: list[Positive], rank: Positive) -> MeasureResult:
    """Check whether LoKr trains u_p u_q + r (v_p + v_q) numbers in a layer of p outputs and q inputs (equations 4 and 5).

    For a size s (p or q), u_s is its largest divisor up to min(factor, sqrt(s)), and v_s = s / u_s. The rank r must be
    small enough that LoKr decomposes the right block of every layer.
    """
    shown, holds = [], True
    for inputs, outputs in sides:
        for factor in factors:
            found = linear_trainable(inputs, outputs, "lokr", {"rank": rank, "factor": factor})
            (u_p, v_p), (u_q, v_q) = (_divided(size, factor) for size in (outputs, inputs))
            holds = holds and found.value == u_p * u_q + rank * (v_p + v_q)
            shown.append(f"{outputs} x {inputs}, f = {factor}: {found.value} = {u_p} * {u_q} + {rank} ({v_p} + {v_q})")
    return MeasureResult(holds, "; ".join(shown))


@measure("property")
def kronecker_ranks_multiply(inputs: Positive, outputs: Positive, factor: Positive, rank: Positive) -> MeasureResult:
    """Check whether the rank of LoKr's update is the product of the ranks of its two blocks, with random values in both."""
    import torch

    tensors, update = random_update(inputs, outputs, "lokr", {"rank": rank, "factor": factor})
    C, right = tensors["C"], tensors["W2"] if "W2" in tensors else tensors["B"] @ tensors["A"]
    left_rank, right_rank, whole = (int(torch.linalg.matrix_rank(t)) for t in (C, right, update))
    return MeasureResult(whole == left_rank * right_rank, f"{left_rank} * {right_rank}, and {whole} of the update")


def _divided(size: int, factor: int) -> tuple[int, int]:
    u = next(n for n in range(size, 0, -1) if size % n == 0 and n <= factor and n * n <= size)
    return u, size // u
