"""LoRA on stacked experts, grouped by expert: the gradients that its docstring promises."""

from __future__ import annotations

import torch

from harness.kernels.torch.lora_experts import grouped_lora_linear

EXPERTS, RANK, INPUTS, OUTPUTS = 3, 2, 4, 5
COUNTS = torch.tensor([2, 0, 3])


def test_it_is_differentiable_twice_also_in_a_dense_weight() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (int(COUNTS.sum()), INPUTS), (EXPERTS, OUTPUTS, INPUTS), (EXPERTS, RANK, INPUTS), (EXPERTS, OUTPUTS, RANK)
    given = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *one: grouped_lora_linear(*one, 0.5, COUNTS), given)
    assert torch.autograd.gradgradcheck(lambda *one: grouped_lora_linear(*one, 0.5, COUNTS), given)
