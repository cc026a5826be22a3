"""Shared by the tests of the references: a model of two layers, seeded noise, and the comparison with float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from harness.conformance.comparison.tolerance_policies import noise_floor
from harness.conformance.subject import DTYPES


class Two(nn.Module):
    """q_proj maps 12 to 10 with a bias, v_proj maps 10 to 7 without. So blocks of 64 weights do not end where rows end."""

    LAST = 7

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj = nn.Linear(12, 10, dtype=dtype)
        self.v_proj = nn.Linear(10, self.LAST, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.v_proj(torch.tanh(self.q_proj(x)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def assert_same(have: dict[str, Tensor], want: dict[str, Tensor], dtype: str = "float64") -> None:
    """Assert that `have` agrees with `want` by the noise-floor policy.

    `want` is in float64. The noise is the error of rounding `want` to `dtype`.
    """
    judged = noise_floor(have, want, {n: t.to(DTYPES[dtype]) for n, t in want.items()}, dtype)
    assert judged.passed, judged
