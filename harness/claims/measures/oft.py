"""Measures: OFT's parameter counts and its rotations."""

from __future__ import annotations

from harness.claims.measure import MeasureResult, Positive, measure
from harness.claims.measures.models_without_presets import linear_trainable


@measure("property")
def rotation_counts_by_formula(inputs: Positive, outputs: Positive, blocks: list[Positive]) -> MeasureResult:
    """Check whether OFT trains d (d / r - 1) / 2 numbers in a layer of d inputs, for each number of blocks r."""
    shown, holds = [], True
    for count in blocks:
        found = linear_trainable(inputs, outputs, "oft", {"block_size": inputs // count})
        holds = holds and 2 * found.value == inputs * (inputs // count - 1)
        shown.append(f"r = {count}: {found.value}")
    return MeasureResult(holds, f"d = {inputs}, {', '.join(shown)}")


@measure("property")
def cayley_is_orthogonal(sizes: list[Positive]) -> MeasureResult:
    """Check whether OFT's blocks R, by Cayley's exact formula from random Q, are rotations (R^T R = I, det R = 1).

    Each Q is skew-symmetric. Zeros in Q must give the identity. The error may be a thousand roundings of float64.
    """
    import torch

    from reference.oft import rotations

    shown, holds = [], True
    for size in sizes:
        packed = torch.randn(8, size * (size - 1) // 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        one = torch.eye(size, dtype=torch.float64)
        R = rotations(packed, size, "exact", 5)
        error = max(float((R.mT @ R - one).abs().max()), float((torch.linalg.det(R) - 1).abs().max()))
        holds = holds and error < 1000 * torch.finfo(R.dtype).eps
        holds = holds and torch.equal(rotations(0 * packed, size, "exact", 5), one.expand_as(R))
        shown.append(f"K = {size}: {error:.1e}")
    return MeasureResult(holds, f"largest error of R^T R and of det R: {', '.join(shown)}")
