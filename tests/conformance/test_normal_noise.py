"""Normal random numbers for the tensors of a case."""

from __future__ import annotations

import torch

from harness.conformance.normal_noise import normal_noise


def noise(seed: int) -> torch.Tensor:
    return normal_noise((300, 400), torch.Generator().manual_seed(seed))


def test_nearly_every_number_loses_digits_in_float32() -> None:
    drawn = noise(1)
    assert drawn.dtype == torch.float64
    assert float((drawn != drawn.float().double()).double().mean()) > 0.99


def test_the_numbers_are_normal_and_follow_from_the_seed() -> None:
    drawn = noise(1)
    assert torch.equal(drawn, noise(1))
    assert not torch.equal(drawn, noise(2))
    deviations = drawn.numel() ** 0.5 * torch.stack([drawn.mean(), drawn.square().mean() - 1, drawn.pow(3).mean()])
    assert bool((deviations.abs() < 5 * torch.tensor([1.0, 2.0, 15.0]).sqrt()).all())  # five standard errors
