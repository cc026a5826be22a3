"""LoRA on stacked experts, grouped by expert: the gradients that the docstrings promise."""

from __future__ import annotations

import pytest
import torch

from harness.kernels.torch import lora_experts as module
from harness.kernels.torch.lora_experts import grouped_lora_linear, lora_experts

EXPERTS, RANK, INPUTS, OUTPUTS = 3, 2, 4, 5
COUNTS = torch.tensor([2, 0, 3])


def test_it_is_differentiable_twice_also_in_a_dense_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (int(COUNTS.sum()), INPUTS), (EXPERTS, OUTPUTS, INPUTS), (EXPERTS, RANK, INPUTS), (EXPERTS, OUTPUTS, RANK)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *one: grouped_lora_linear(*one, 0.5, COUNTS), given)
    assert torch.autograd.gradgradcheck(lambda *one: grouped_lora_linear(*one, 0.5, COUNTS), given)


def test_the_block_is_differentiable_twice_in_every_floating_argument() -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.tensor([[2, 0], [0, 2], [2, 1]])
    shapes = (
        (3, INPUTS), (3, 2), (EXPERTS, 2 * OUTPUTS, INPUTS), (EXPERTS, INPUTS, OUTPUTS),
        (EXPERTS * RANK, INPUTS), (2 * OUTPUTS, RANK * EXPERTS), (EXPERTS * RANK, OUTPUTS), (INPUTS, RANK * EXPERTS),
    )  # fmt: skip
    given = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]

    def block(x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        return lora_experts(x, chosen, *others, scaling=0.5, transposed=False)

    assert torch.autograd.gradcheck(block, given)
    assert torch.autograd.gradgradcheck(block, given)


def test_tokens_without_an_expert_are_refused_with_a_reason() -> None:
    sizes = (2, 6, 4), (2, 4, 3), (4, 4), (6, 4), (4, 3), (4, 4)
    with pytest.raises(ValueError, match=r"chosen has the shape \(3, 0\): no expert per token"):
        lora_experts(
            torch.ones(3, 4),
            torch.zeros(3, 0, dtype=torch.int64),
            torch.ones(3, 0),
            *map(torch.ones, sizes),
            1.0,
            False,
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_of_the_routing_is_the_same_in_pieces(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(-4, 5, (14, 6), generator=generator).to(
        dtype
    )  # small integers: every order gives the same sum
    order = torch.randperm(14, generator=generator)
    at = order.argsort().view(7, 2)
    dy = torch.randint(-4, 5, (7, 6), generator=generator).to(dtype)

    def gradient(pieces: int) -> torch.Tensor:
        monkeypatch.setattr(module, "_CACHED", pieces)
        weights = torch.ones(7, 2, dtype=dtype, requires_grad=True)
        (found,) = torch.autograd.grad(module._WeightedSum.apply(rows, weights, order, at), weights, dy)
        return found

    whole = (rows[at].double() * dy.double().unsqueeze(1)).sum(-1)
    for pieces in (0, 24, 1000):  # a token at a time, two tokens, all
        assert gradient(pieces).double().equal(whole)
