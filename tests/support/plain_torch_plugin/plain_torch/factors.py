"""Initial values of factors, drawn in float64 so that every dtype starts from the same numbers."""

import torch
from torch import Tensor, nn

Generator = torch.Generator


def uniform(shape: tuple[int, ...], bound: float, generator: Generator) -> Tensor:
    """Draw numbers that are uniform in +-bound."""
    return (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1) * bound


def normal(shape: tuple[int, ...], deviation: float, generator: Generator) -> Tensor:
    """Draw normal numbers."""
    return deviation * torch.randn(shape, generator=generator, dtype=torch.float64)


def by_columns(rows: int, columns: int, generator: Generator) -> Tensor:
    """Draw a matrix that is uniform in +-1/sqrt(columns)."""
    return uniform((rows, columns), columns**-0.5, generator)


def orthogonal(rank: int, inputs: int, outputs: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw A and B with B A = 0, whose numbers have the mean square 1/200."""
    if rank % 2:
        raise ValueError("init=orthogonal requires an even rank")
    basis = torch.linalg.qr(normal((rank, rank), 1, generator)).Q
    A = basis[:, 0::2] @ normal((rank // 2, inputs), 0.1, generator)
    B = normal((outputs, rank // 2), 0.1, generator) @ basis[:, 1::2].T
    return A, B


def lora_factors(init: str, rank: int, inputs: int, outputs: int, generator: Generator) -> tuple[Tensor, Tensor]:
    """Draw LoRA's A (rank, inputs) and B (outputs, rank)."""
    if init == "orthogonal":
        return orthogonal(rank, inputs, outputs, generator)
    A = by_columns(rank, inputs, generator) if init == "kaiming" else normal((rank, inputs), 1 / rank, generator)
    return A, torch.zeros(outputs, rank, dtype=torch.float64)


def trained(values: Tensor, base: nn.Module, dtype: torch.dtype) -> nn.Parameter:
    """Return a trainable parameter on the device of a base layer."""
    device = next(iter(base.state_dict().values())).device
    return nn.Parameter(values.to(device=device, dtype=dtype).contiguous())
