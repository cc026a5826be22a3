"""Where LoRA's A and B start from: the usual start and its variants. Not a Method; the knob `init` of `lora.py` chooses.

kaiming: A uniform in +-1/sqrt(in), B zero: what loralib and HF peft do by default. gaussian: A normal, B zero, as the paper
says (arXiv:2106.09685, section 4.1) without a standard deviation; 1/r is HF peft's. orthogonal: neither is zero, but their
product is (HF peft's `init_lora_weights="orthogonal"`, after datta0.github.io/posts/rethink-lora-init).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SPREAD = 10.0
"""What HF peft divides its orthogonal start by, each factor."""


def start(init: str, rank: int, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return A (rank, inputs) and B (outputs, rank), drawn in float64 so that every dtype starts from the same numbers.

    Raises ValueError for an odd rank with `orthogonal`: half of the directions are A's, the other half B's.
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


def _orthogonal(rank: int, inputs: int, outputs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Spread the rows of A over one half of an orthonormal basis of R^rank, the columns of B over the other: B A = 0."""
    if rank % 2:
        raise ValueError(
            f"rank {rank} is odd, and init=orthogonal shares the directions out in halves: choose an even one"
        )

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    basis, _ = torch.linalg.qr(normal(rank, rank))
    of_a, of_b = basis[0::2], basis[1::2]
    A = (normal(inputs, rank // 2) @ of_a).T / _SPREAD
    return A.contiguous(), normal(outputs, rank // 2) @ of_b / _SPREAD


@torch.no_grad()
def put(init: str, A: Tensor, B: Tensor, generator: torch.Generator) -> None:
    """Write a start into A (R, D) and B (E, R) of a layer that has been made elsewhere. Raises as `start` does."""
    for factor, drawn in zip((A, B), start(init, A.shape[0], A.shape[1], B.shape[0], generator), strict=True):
        factor.copy_(drawn)
