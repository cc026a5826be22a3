"""LoRA on stacked experts, grouped by expert: the gradients that the docstrings promise."""

from __future__ import annotations

import torch

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
