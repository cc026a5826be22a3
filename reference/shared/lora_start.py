"""Initial A and B of LoRA, selected by `init` in its Config. Not a Method.

kaiming: A is uniform in +-1/sqrt(in), and B is zero. This is the default of loralib and HF peft. gaussian: A is normal,
and B is zero, as in the paper (arXiv:2106.09685, section 4.1). The paper states no standard deviation; ours is 1/r, as
in HF peft. orthogonal: A and B are not zero, but their product B A is zero. This is `init_lora_weights="orthogonal"` of
HF peft, after datta0.github.io/posts/rethink-lora-init.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from reference.shared.layers import device_of, features_in_out, floating_dtype

_ORTHOGONAL_DIVISOR = 10.0
"""Number by which both orthogonal factors are divided, as in HF peft."""


def initial_factors(
    init: str, rank: int, inputs: int, outputs: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Return initial A (rank, inputs) and B (outputs, rank) in float64, so that every dtype starts from the same numbers.

    init: `kaiming`, `gaussian` or `orthogonal`. Raises ValueError if `orthogonal` gets an odd rank.
    """
    if init == "orthogonal":
        return _orthogonal(rank, inputs, outputs, generator)
    A = torch.empty(rank, inputs, dtype=torch.float64)
    if init == "gaussian":
        A.normal_(0, 1 / rank, generator=generator)
    else:
        bound = 1 / math.sqrt(inputs)
        A.uniform_(-bound, bound, generator=generator)
    return A, torch.zeros(outputs, rank, dtype=torch.float64)


def linear_factors(base: nn.Module, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return initial A and B for a linear layer or a Conv1D, by LoRA's default `kaiming`.

    Dtype and device are those of the layer.
    """
    A, B = initial_factors("kaiming", rank, *features_in_out(base), generator)
    dtype, device = floating_dtype(base), device_of(base)
    return A.to(device, dtype), B.to(device, dtype)


def embedding_factors(base: nn.Embedding, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return initial A (rank, num) and B (dim, rank) for an embedding. A is zero, and B is standard normal.

    Dtype and device are those of the embedding.
    """
    B = torch.randn(base.embedding_dim, rank, dtype=torch.float64, generator=generator).to(base.weight)
    return base.weight.new_zeros(rank, base.num_embeddings), B


def _orthogonal(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A and B with B A = 0.

    The columns of A and the rows of B lie in two orthogonal subspaces of R^rank, each of dimension rank / 2.
    """
    if rank % 2:
        raise ValueError(f"rank {rank} is odd; init=orthogonal requires an even rank")

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis, _ = torch.linalg.qr(normal(rank, rank))
    of_a, of_b = basis[0::2], basis[1::2]
    A = (normal(inputs, rank // 2) @ of_a).T / _ORTHOGONAL_DIVISOR
    return A.contiguous(), normal(outputs, rank // 2) @ of_b / _ORTHOGONAL_DIVISOR


@torch.no_grad()
def write_initial_factors(init: str, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """Overwrite A (R, D) and B (E, R) with new initial values. Raises ValueError if `orthogonal` gets an odd rank."""
    for factor, drawn in zip((A, B), initial_factors(init, A.shape[0], A.shape[1], B.shape[0], generator), strict=True):
        factor.copy_(drawn)
