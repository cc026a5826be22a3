"""GaLore without temporaries of the weight's size and without a full SVD."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.registry import DTYPES, implements
from reference.spec import Deviation

if TYPE_CHECKING:
    from torch import Generator, Tensor, nn

    from harness.methods.spec import Adapted
    from reference.galore import Config
DEVIATIONS = (
    Deviation(
        topic="singular vectors of a float32 gradient, and of a narrower one",
        paper="an SVD in float32",
        here="eigenvectors of the smaller Gram matrix in float64, in which its products are exact",
        why="squares in float64 resolve what an SVD in float32 resolves; a float64 gradient gets an SVD",
    ),
    Deviation(
        topic="randomised SVD (niter > 0)",
        paper="bases by Householder reflections",
        here="by Cholesky in float64 where the columns are far enough from dependent; the sketch is the reference's",
        why="both span the same space",
    ),
)


@implements("galore", name="fused", dtypes=DTYPES)
def galore(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Train with the fused GaLore; the reference selects layers and parameters."""
    from harness.kernels.torch.optimizers.galore import GaLore
    from reference.galore import GaLoreModel, attach

    class Fused(GaLoreModel):
        def optimizer(self, lr: float, weight_decay: float, bits: int = 32) -> Any:
            """Return the fused optimizer with the reference's groups."""
            theirs = super().optimizer(lr, weight_decay, bits)
            return GaLore(theirs.param_groups, lr, weight_decay, self.config.eps)

    adapted = attach(model, config, generator)
    return Fused(adapted.model, adapted.layers, adapted.config)


@implements("galore_step", name="fused", kind="operation", dtypes=DTYPES)
def galore_step(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, M: Tensor, V: Tensor, side: str, **how: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Take one step in a given subspace; P and Q imply `side`."""
    from harness.kernels.torch.galore_step import galore_step

    return galore_step(W, G, P, Q, M, V, **how)


@implements("galore8bit_step", name="fused", kind="operation", dtypes=DTYPES)
def galore8bit_step(
    W: Tensor, G: Tensor, P: Tensor | None, Q: Tensor | None, side: str, **how: Any
) -> tuple[Tensor, ...]:
    """Take one step in a given subspace with 8-bit moments; P and Q imply `side`."""
    from harness.kernels.torch.galore_step import galore8bit_step

    return galore8bit_step(W, G, P, Q, **how)
