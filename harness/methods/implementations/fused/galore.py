"""GaLore: the step without a temporary of the weight's size, and the singular vectors without a whole SVD."""

from __future__ import annotations

from typing import Any

from harness.methods.registry import DTYPES, implements
from reference.spec import Deviation

DEVIATIONS = (
    Deviation(
        topic="singular vectors of a float32 gradient, and of a narrower one",
        paper="an SVD in float32",
        here="eigenvectors of the smaller Gram matrix in float64, in which its products are exact",
        why="what an SVD in float32 resolves, float64 resolves by the squares as well; a float64 gradient has an SVD",
    ),
    Deviation(
        topic="randomised SVD (niter > 0)",
        paper="bases by Householder reflections",
        here="by Cholesky in float64 where the columns are far enough from dependent; the sketch is the reference's",
        why="both span the same space",
    ),
)


@implements("galore", name="fused", dtypes=DTYPES)
def galore(model: Any, config: Any, generator: Any) -> Any:
    """Train by our GaLore; config as `reference.galore.Config`. What is adapted, and what trains, is the reference's."""
    from harness.kernels.torch.optimizers.galore import GaLore
    from reference.galore import Adapted, attach

    class Fused(Adapted):
        def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> Any:
            """Return ours with the groups of the reference's."""
            theirs = super().optimizer(lr, weight_decay, bits)
            return GaLore(theirs.param_groups, lr, weight_decay, self.config.eps)

    adapted = attach(model, config, generator)
    return Fused(adapted.model, adapted.layers, adapted.config)


@implements("galore_step", name="fused", kind="operation", dtypes=DTYPES)
def galore_step(W: Any, G: Any, P: Any, Q: Any, M: Any, V: Any, side: str, **how: Any) -> tuple[Any, Any, Any]:
    """Take one step in the subspace given; `side` is what P and Q say already."""
    from harness.kernels.torch.galore_step import galore_step

    return galore_step(W, G, P, Q, M, V, **how)


@implements("galore8bit_step", name="fused", kind="operation", dtypes=DTYPES)
def galore8bit_step(W: Any, G: Any, P: Any, Q: Any, side: str, **how: Any) -> tuple[Any, ...]:
    """Take one step in the subspace given, with moments in 8 bits; `side` is what P and Q say already."""
    from harness.kernels.torch.galore_step import galore8bit_step

    return galore8bit_step(W, G, P, Q, **how)
