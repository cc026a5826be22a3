"""Faults of full fine-tuning and of the frozen base."""

from __future__ import annotations

from typing import Any

from torch import nn

from harness.conformance.faults import FaultCase, planted
from harness.conformance.faults.patched_copy import PatchedCopy

CASE = FaultCase()


@planted("full", "layers")
def leaves_out_the_biases(its: PatchedCopy) -> None:
    its.line(
        "model.requires_grad_(True)",
        'model.requires_grad_(True)\n    [p.requires_grad_("bias" not in n) for n, p in model.named_parameters()]',
    )


@planted("full", "gradient", "step")
def loses_the_gradient_of_one_weight(its: PatchedCopy) -> None:
    def change(adapted: Any) -> None:
        layer = adapted.layers["second"]
        layer.forward = lambda x: nn.functional.linear(x, layer.weight.detach(), layer.bias)

    its.then(change)


@planted("full", "parameters")
def lists_a_parameter_twice(its: PatchedCopy) -> None:
    its.line("return list(self.model.parameters())", "return [*self.model.parameters(), *self.model.parameters()][:-1]")


@planted("frozen", "layers")
def trains_all_the_same(its: PatchedCopy) -> None:
    its.line("model.requires_grad_(False)", "model.requires_grad_(True)")


@planted("frozen", "base", "identity")
def changes_the_base(its: PatchedCopy) -> None:
    its.line("model.requires_grad_(False)", "model.requires_grad_(False)\n    model.first.weight.data.add_(1e-3)")
