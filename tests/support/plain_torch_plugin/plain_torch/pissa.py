"""PiSSA (arXiv:2404.02948): A and B start as the principal part of W, and a frozen residual replaces W."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from plain_torch.adapted import Adapted, AdapterLayer, replace
from plain_torch.factors import Generator, normal
from plain_torch.layers import kind_of, matrix, sizes, with_matrix, with_weight
from plain_torch.lora import LoraEmbedding, LowRank, embed_scale

KINDS = ("linear", "Conv1D", "embedding")


def randomised_svd(W: Tensor, rank: int, niter: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first singular vectors and values of W by Halko's subspace iteration."""
    tall = W if W.shape[0] >= W.shape[1] else W.T
    sketch = normal((tall.shape[1], rank), 1, generator).to(W.device)
    Q = torch.linalg.qr(tall @ sketch).Q
    for _ in range(niter):
        Q = torch.linalg.qr(tall.T @ Q).Q
        Q = torch.linalg.qr(tall @ Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ tall, full_matrices=False)
    U = Q @ U
    return (U, S, Vh) if tall is W else (Vh.T, S, U.T)


def principal(W: Tensor, rank: int, niter: int, scaling: float, generator: Generator) -> tuple[Tensor, Tensor]:
    """Return A and B in float64: scaling B A is the principal part of W. The largest entry of each row of A is positive."""
    W = W.detach().double()
    if niter:
        U, S, Vh = randomised_svd(W, rank, niter, generator)
    else:
        U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    signs = Vh.gather(1, Vh.abs().argmax(dim=1, keepdim=True)).sign()
    root = (S / scaling).sqrt()
    return root[:, None] * Vh * signs, U * root * signs.T


class Pissa(LowRank):
    """Layer with LoRA's factors, and a residual (E, D) in the place of the base weight."""

    residual: Tensor

    def split(self, W: Tensor, config: Any, generator: Generator) -> None:
        """Set A, B and the residual, which is computed from the rounded factors and rounded once."""
        with torch.no_grad():
            A, B = principal(W, config.rank, config.niter, self.scaling, generator)
            self.A.copy_(A)
            self.B.copy_(B)
            rest = W.double() - self.scaling * (self.B.double() @ self.A.double())
        self.register_buffer("residual", rest.to(self.A.dtype))

    def weight(self) -> Tensor:
        """Return W_res + s B A, in at least float32."""
        A, B = self.widened()
        return self.residual + self.scaling * (B @ A)


def empty_factors(W_shape: tuple[int, int], rank: int) -> tuple[Tensor, Tensor]:
    """Return room for A and B. Raise ValueError if the rank exceeds the smaller side."""
    if rank > min(W_shape):
        raise ValueError(f"rank {rank} exceeds the smaller side of {tuple(W_shape)}")
    return torch.zeros(rank, W_shape[1]), torch.zeros(W_shape[0], rank)


class PissaLinear(Pissa):
    """Linear layer or Conv1D. Only the bias of its base is used."""

    def __init__(self, base: nn.Module, config: Any, generator: Generator) -> None:
        super().__init__(base, config, empty_factors(sizes(base), config.rank), sizes(base)[0])
        self.split(matrix(base), config, generator)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.residual, self.base.bias) + self.scaling * functional.linear(
            functional.linear(x, self.A), self.B
        )

    def merged(self) -> nn.Module:
        return with_matrix(self.base, self.weight(), self.base.bias)


class PissaEmbedding(Pissa, LoraEmbedding):
    """Embedding (N, E), whose transposed table is W."""

    def __init__(self, base: nn.Embedding, config: Any, generator: Generator) -> None:
        empty_factors((base.embedding_dim, base.num_embeddings), config.rank)
        super().__init__(base, config, generator)
        self.split(base.weight.T, config, generator)

    def forward(self, ids: Tensor) -> Tensor:
        rest = functional.embedding(ids, self.residual.T) * embed_scale(self.base, self.residual)
        return rest + self.looked_up(ids)

    def merged(self) -> nn.Module:
        return with_weight(self.base, self.weight().T)


def pissa_layer(base: nn.Module, config: Any, generator: Generator) -> AdapterLayer:
    """Return the PiSSA layer of a base layer."""
    return (PissaEmbedding if kind_of(base) == "embedding" else PissaLinear)(base, config, generator)


def attach(model: nn.Module, config: Any, generator: Generator) -> Adapted:
    """Replace every target by a PiSSA layer."""
    return Adapted(model, replace(model, config.targets, KINDS, lambda base: pissa_layer(base, config, generator)))
