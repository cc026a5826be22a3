"""PiSSA without a full SVD, and with the low-rank term added in place to the residual's product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.methods.registry import DTYPES, implements
from reference.spec import Deviation

if TYPE_CHECKING:
    import torch
    from torch import Generator, Tensor, nn

    from harness.methods.spec import Adapted
    from reference.pissa import Config
DEVIATIONS = (
    Deviation(
        topic="exact SVD (niter = 0) of a float32 weight, and of a narrower one",
        paper="LAPACK's, in float32",
        here="eigenvectors of the smaller Gram matrix in float64, unless the singular values span more than 2^12",
        why="squares in float64 resolve what an SVD in float32 resolves; a float64 weight gets an SVD",
    ),
    Deviation(
        topic="randomised SVD (niter > 0)",
        paper="bases by Householder reflections",
        here="by Cholesky in float64 where the columns are far enough from dependent; the sketch is drawn as the "
        "reference's is",
        why="both span the same space",
    ),
)


@implements("pissa", name="fused", dtypes=DTYPES)
def pissa(model: nn.Module, config: Config, generator: Generator) -> Adapted:
    """Attach layers that compute by `lora_linear` over the residual. Raises ValueError as the reference does."""
    import torch

    from harness.kernels.torch.support.shared_input import link
    from harness.methods.implementations.fused.layers.pissa import FusedPissaLinear
    from reference.pissa import PissaEmbedding
    from reference.shared.adapted import AdaptedLayers
    from reference.shared.layers import dense_weight, floating_dtype, kind_of, replace, targets

    found = targets(model, config.targets, ("linear", "embedding"))
    for path, base in found.items():
        features = "num_embeddings embedding_dim" if kind_of(base) == "embedding" else "in_features out_features"
        least = min(getattr(base, name) for name in features.split())
        if config.rank > least:
            raise ValueError(f"rank {config.rank}: {path} has only {least} singular values")
    model.requires_grad_(False)
    layers: dict[str, Any] = {}
    for path, base in found.items():
        with torch.no_grad():
            start = _start(dense_weight(base), config, floating_dtype(base), generator)
        kind = PissaEmbedding if kind_of(base) == "embedding" else FusedPissaLinear
        layers[path] = kind(base, *start, config.alpha / config.rank)
        replace(model, path, layers[path])
    link({path: layer for path, layer in layers.items() if isinstance(layer, FusedPissaLinear)})
    return AdaptedLayers(model, layers)


def _start(weight: Tensor, config: Config, dtype: torch.dtype, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return (A (R, D), B (E, R), residual (E, D)) in `dtype`, like `reference.pissa.split`."""
    import torch

    from harness.kernels.torch.support.range_finder import leading_svd, randomised_svd
    from reference.pissa import signed

    W = weight.to(torch.promote_types(weight.dtype, torch.float32))
    scaling = config.alpha / config.rank
    if config.niter:
        sketch = torch.randn(min(W.shape), config.rank, generator=generator, dtype=torch.float64).to(W)
        U, S, V = randomised_svd(W, sketch, config.niter)
    else:
        U, S, V = leading_svd(W, config.rank)
    U, Vt = signed(U, V.T)
    root = (S / scaling).sqrt()
    A, B = (root[:, None] * Vt).to(dtype).contiguous(), (U * root).to(dtype).contiguous()
    return A, B, torch.addmm(W, B.to(W.dtype), A.to(W.dtype), alpha=-scaling).to(dtype)
