"""Lion and LAMB with 8-bit moments, one number at a time and by what their papers state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from harness.conformance.comparison.tolerance_policies import exact
from reference.operations import adamw8bit
from reference.operations.dynamic_map import dequantize_blockwise, dynamic_map, quantize_blockwise
from reference.operations.lamb8bit import lamb8bit_step
from reference.operations.lion8bit import lion8bit_step
from support.two_layer_model import assert_same, draw

N = 600  # the last block is short
KNOBS: dict[str, Any] = {"step": 4, "lr": 0.1, "betas": (0.7, 0.9), "eps": 1e-3}


def codes(seed: int, *, signed: bool) -> tuple[Tensor, Tensor]:
    value = draw(N, seed=seed)
    return quantize_blockwise(value if signed else value.square(), dynamic_map(signed))


def moments() -> dict[str, Tensor]:
    (m, m_absmax), (v, v_absmax) = codes(7, signed=True), codes(8, signed=False)
    return {"m": m, "m_absmax": m_absmax, "v": v, "v_absmax": v_absmax}


def test_lion_moves_every_weight_by_lr_along_the_sign_and_keeps_the_moment_of_the_second_beta() -> None:
    p, g, (m, m_absmax) = draw(N, seed=1), draw(N, seed=2), codes(7, signed=True)
    moment = dequantize_blockwise(m, m_absmax, dynamic_map(signed=True)).double()
    moved, after, absmax = lion8bit_step(p, g, m, m_absmax, lr=0.1, betas=(0.7, 0.9), weight_decay=0.5)
    signs = [(x > 0) - (x < 0) for x in (0.7 * moment + 0.3 * g).tolist()]
    assert_same({"p": moved}, {"p": 0.95 * p - 0.1 * torch.tensor(signs, dtype=torch.float64)})
    assert exact(*({"m": a, "s": b} for a, b in ((after, absmax), kept(0.9 * moment + 0.1 * g)))).passed


def kept(moment: Tensor) -> tuple[Tensor, Tensor]:
    return quantize_blockwise(moment, dynamic_map(signed=True))


def test_lion_leaves_a_weight_without_gradient_and_moment_where_it_is() -> None:
    p, g = draw(N, seed=1), torch.zeros(N, dtype=torch.float64)
    g[::2] = 1.0
    state = torch.zeros(N, dtype=torch.uint8), torch.zeros(3)
    for _ in range(3):
        moved, *state = lion8bit_step(p, g, *state, lr=0.1, betas=(0.9, 0.99), weight_decay=0.0)
        assert exact({"p": moved[1::2]}, {"p": p[1::2]}).passed
        p = moved


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
def test_a_step_of_lamb_is_as_long_as_lr_times_the_tensor(size: float) -> None:
    p, g = size * draw(20, 30, seed=1), draw(20, 30, seed=2)
    after, _ = lamb8bit_step(p, g, moments(), weight_decay=0.3, **KNOBS)
    assert_same({"length": (after - p).norm()}, {"length": 0.1 * p.norm()})


def test_the_direction_and_the_moments_of_lamb_are_those_of_adamw() -> None:
    p, g, state = draw(N, seed=1), draw(N, seed=2), moments()
    after, mine = lamb8bit_step(p, g, state, weight_decay=0.0, **KNOBS)
    other = p.clone()
    adamw8bit.adamw8bit_step(other, g, state, weight_decay=0.0, **KNOBS)
    assert_same({"p": (after - p) / (after - p).norm()}, {"p": (other - p) / (other - p).norm()})
    assert exact(mine, state).passed


def test_lamb_moves_a_tensor_of_zeros_by_the_step_of_adam() -> None:
    p, g, state = torch.zeros(N, dtype=torch.float64), draw(N, seed=2), moments()
    after, _ = lamb8bit_step(p, g, state, weight_decay=0.3, **KNOBS)
    adamw8bit.adamw8bit_step(p, g, state, weight_decay=0.0, **KNOBS)
    assert_same({"p": after}, {"p": p})


def test_one_nan_in_a_gradient_makes_every_weight_of_lamb_nan() -> None:
    """A norm of NaN is no norm of 0: the step must not look healthy."""
    g = draw(N, seed=2)
    g[7] = torch.nan
    after, _ = lamb8bit_step(draw(N, seed=1), g, moments(), weight_decay=0.3, **KNOBS)
    assert after.isnan().all()
